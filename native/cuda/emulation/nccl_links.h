// Connections between the processes of emulated GPUs: a socket of this host from each rank to each other. Bytes only, as NCCL
// moves them: what the ranks call is not compared. For tests alone.
#pragma once

#include <atomic>
#include <cstddef>
#include <string>
#include <vector>

namespace viaduct::emulation {

/// A peer has gone, or this rank was aborted.
struct LinksBroken {};

struct Part {
  bool send;
  int peer;
  void* data;
  size_t bytes;
};

class NcclLinks {
 public:
  /// `aborted` ends every wait.
  explicit NcclLinks(const std::atomic<bool>& aborted) : aborted_(aborted) {}
  ~NcclLinks();
  /// Meets the other ranks under `id`. Throws LinksBroken.
  void connect(const std::string& id, int rank, int size);
  /// Runs all parts together; those of one direction with one peer in order. Throws LinksBroken.
  void exchange(const std::vector<Part>& parts);
  int rank() const { return rank_; }
  int size() const { return size_; }

 private:
  const std::atomic<bool>& aborted_;
  int rank_ = 0;
  int size_ = 1;
  std::vector<int> sockets_;  // by rank; -1 for this one
};

}  // namespace viaduct::emulation
