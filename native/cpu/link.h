// How the bytes of one group of ranks travel: Gloo's connections (gloo_link.h) or memory shared on one host (shm_link.h).
// A link knows transfers between ranks of its group and nothing of tensors or sums; collectives.h has the algorithms.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../comm_order.h"

namespace viaduct::cpu {

using Clock = std::chrono::steady_clock;

/// Says which part of which operation a transfer is; equal on both sides when both run the same program.
struct Tag {
  CommOp op = CommOp::Barrier;
  uint16_t reserved = 0;
  uint32_t step = 0;
  uint64_t sequence = 0;
  /// Payload of the whole operation, where it is the same on all ranks; else 0.
  uint64_t bytes = 0;
};

/// One block of bytes to or from a peer (a rank of the group). Transfers of one direction between two ranks keep their order.
struct Transfer {
  bool send = false;
  int peer = 0;
  void* data = nullptr;
  size_t bytes = 0;
  Tag tag;
};

/// Why an exchange did not come to its end; the communicator makes an Error of it.
struct LinkFailure {
  enum class Kind { Timeout, PeerLost, PeerGaveUp, Mismatch, Aborted };
  Kind kind;
  std::vector<int> peers;  // ranks of the group
  std::string detail;
};

class Link {
 public:
  virtual ~Link() = default;
  /// "gloo" or "shm".
  virtual const char* kind() const = 0;
  /// Bytes to a peer that are worth one step of a pipeline.
  virtual size_t chunkBytes() const = 0;
  /// Runs all transfers together until all are done: no order of sends and receives can deadlock. Throws LinkFailure.
  virtual void exchange(const std::vector<Transfer>& transfers, Clock::time_point deadline) = 0;
  /// From any thread: exchange() fails now and later, here at once and on the peers as soon as they notice.
  virtual void abort(const std::string& reason) = 0;
};

}  // namespace viaduct::cpu
