// Files by position: open, read, write, reserve, swap. Each call is complete or throws with a stable code and the path. Never
// a mapping: a file that shrinks under a mapping kills the process, a read that ends early is an error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace viaduct::io {

/// An open file, closed at the end of its life.
class File {
 public:
  static File forReading(const std::string& path);
  /// An existing file; its size does not change.
  static File forWriting(const std::string& path);
  /// A new file. Throws ERR_TARGET_EXISTS when there is one.
  static File create(const std::string& path);
  File(File&& other) noexcept;
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File();

  /// All `bytes` bytes, or ERR_IO when the file ends before.
  void readAt(void* to, size_t bytes, int64_t offset) const;
  void writeAt(const void* from, size_t bytes, int64_t offset) const;
  /// Reserves the space of the first `bytes` bytes, so that later writes cannot run out of it. Throws ERR_NO_SPACE.
  void reserve(int64_t bytes) const;
  /// Begins to write what is dirty to the disk, without waiting, so that a later flush finds less. A hint: never fails.
  void startWriteback() const;
  const std::string& path() const { return path_; }

 private:
  File(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}
  int fd_;
  std::string path_;
};

/// Bytes that this process has read and written through File, so far.
struct Counters {
  int64_t bytesRead = 0;
  int64_t bytesWritten = 0;
};
Counters counters();

/// Exchanges two existing paths in one step. False where the file system cannot.
bool exchangePaths(const std::string& a, const std::string& b);

/// Takes flock(2)'s exclusive lock of an open file, which ends with the file or its process. False where another has it.
bool tryLock(int fd);

}  // namespace viaduct::io
