// THE interface that a transport implements: Gloo on CPUs, NCCL on GPUs. Collectives are enqueued on the stream that is
// given and run in program order there. Collectives are out of place unless in and out are the same memory; counts are
// 64-bit elements. Tensors are contiguous. Sums of BF16 and F16 accumulate in float32, in rank order, except NCCL's.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "stream.h"
#include "tensor.h"

namespace viaduct {

enum class ReduceOp : uint8_t { Sum = 0, Max = 1, Min = 2 };

/// Rendezvous key-value store, shared by all ranks of a job. Blocking; called from worker threads only.
class Store {
 public:
  virtual ~Store() = default;
  virtual void set(const std::string& key, const std::vector<uint8_t>& value) = 0;
  /// Waits until the key exists or timeoutMs passed (throws ERR_TIMEOUT naming the key).
  virtual std::vector<uint8_t> get(const std::string& key, int64_t timeoutMs) = 0;
  /// Adds to a counter that starts at 0 and returns the new value.
  virtual int64_t add(const std::string& key, int64_t amount) = 0;
  virtual bool check(const std::string& key) = 0;
};

/// One element of an atomic group of point-to-point transfers.
struct P2p {
  bool send = false;
  int peer = 0;
  TensorRef tensor;
};

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual const std::string& name() const = 0;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// The members' ranks in the world, in this group's order.
  virtual const std::vector<int>& worldRanks() const = 0;
  /// What carries the bytes: "gloo", "shm", "nccl", or "none" for a group of one.
  virtual const char* transport() const = 0;
  /// For one of a device's memory: the communicator of the same ranks for the host's, which carries its host values.
  virtual std::shared_ptr<Communicator> host() const { return nullptr; }

  virtual void allReduce(Stream& s, Out out, In in, ReduceOp op) = 0;
  /// out holds size() blocks of in's size, in rank order.
  virtual void allGather(Stream& s, Out out, In in) = 0;
  /// in holds size() blocks of out's size; rank r gets the reduced block r.
  virtual void reduceScatter(Stream& s, Out out, In in, ReduceOp op) = 0;
  virtual void broadcast(Stream& s, InOut buffer, int root) = 0;
  /// Element counts per peer; blocks lie one after the other in peer order.
  virtual void allToAll(Stream& s, Out out, In in, std::vector<int64_t> sendCounts,
                        std::vector<int64_t> recvCounts) = 0;
  /// All transfers of the group progress together: no order of sends and receives can deadlock.
  virtual void pointToPoint(Stream& s, std::vector<P2p> group) = 0;
  virtual void barrier(Stream& s) = 0;

  // The next two take their place in the program order when they are called; the function that they return does the work,
  // once, blocking, on any thread but a stream's.
  /// Collective over all ranks. Ranks of one colour form a group ordered by (key, rank); colour < 0 gets null.
  virtual std::function<std::unique_ptr<Communicator>()> split(int colour, int key, const std::string& name) = 0;
  /// Small host values of all ranks, in rank order; lengths may differ, 64 MiB a rank at most.
  virtual std::function<std::vector<std::vector<uint8_t>>()> gatherBytes(std::vector<uint8_t> mine) = 0;

  /// From any thread: operations in progress and later ones fail with ERR_COMM naming the reason.
  virtual void abort(const std::string& reason) = 0;
  /// An operation that takes longer fails with ERR_TIMEOUT naming group, op, sequence number and, where known, the ranks missing.
  virtual void setTimeout(int64_t timeoutMs) = 0;

  /// Program-order fingerprint: a hash over (sequence, op, bytes) of all collectives so far, equal on all ranks. Transfers
  /// between two ranks are not in it.
  virtual uint64_t fingerprint() const = 0;
  /// Operations so far.
  virtual int64_t sequence() const = 0;
  /// Bytes that this rank has put into operations so far, by the operation's name.
  virtual std::vector<std::pair<std::string, int64_t>> payload() const = 0;
};

}  // namespace viaduct
