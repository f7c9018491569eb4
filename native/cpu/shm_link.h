// A link through memory that the ranks of one host share: a byte ring for each ordered pair of ranks, a futex to sleep on,
// and a file lock for each rank, which the kernel takes back when a process dies. Linux only.
#pragma once

#include <memory>
#include <string>

#include "link.h"

namespace viaduct::cpu {

/// A shared file that is being set up. The leader creates it; all ranks of the group attach; when all have (the caller
/// makes sure, through another link), the leader unlinks it, so that nothing stays behind whatever happens later.
class ShmFile {
 public:
  /// Leader: a new file for `size` ranks, in /dev/shm. Null when the host has no room or no such memory.
  static std::unique_ptr<ShmFile> create(int size, uint64_t nonce);
  /// "path nonce", for the other ranks.
  std::string address() const;
  void unlink();
  ~ShmFile() { unlink(); }

 private:
  ShmFile(std::string path, uint64_t nonce) : path_(std::move(path)), nonce_(nonce) {}
  std::string path_;
  uint64_t nonce_;
  bool linked_ = true;
};

/// Maps the file as rank `rank` of `size`. Null when it cannot be reached from here: another host, another container.
std::unique_ptr<Link> attachShm(const std::string& address, int rank, int size);

}  // namespace viaduct::cpu
