// Positional file access; see file.h.
#include "file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "../errors.h"

namespace viaduct::io {
namespace {

// One call moves at most this much: Linux itself stops at 2^31 - 4096, macOS refuses more than 2^31 - 1.
constexpr size_t kMostBytes = size_t{1} << 30;

std::atomic<int64_t> bytesRead{0};
std::atomic<int64_t> bytesWritten{0};

[[noreturn]] void fail(int error, const std::string& path, const std::string& what) {
  const std::string message = what + " " + path + ": " + std::strerror(error);
  if (error == ENOENT || error == ENOTDIR) throw Error("ERR_FILE_MISSING", "file", message);
  if (error == EEXIST) throw Error("ERR_TARGET_EXISTS", "file", message);
  if (error == ENOSPC || error == EDQUOT || error == EFBIG) {
    throw Error("ERR_NO_SPACE", "file", message + ": free space there, or choose another target");
  }
  throw Error("ERR_IO", "file", message);
}

int openOrFail(const std::string& path, int flags, const char* what) {
  for (;;) {
    const int fd = ::open(path.c_str(), flags | O_CLOEXEC, 0666);
    if (fd >= 0) return fd;
    if (errno != EINTR) fail(errno, path, what);
  }
}

}  // namespace

// O_NONBLOCK: a pipe that stands where a file should must not hold the thread; it changes nothing for regular files.
File File::forReading(const std::string& path) {
  return {openOrFail(path, O_RDONLY | O_NONBLOCK, "cannot open"), path};
}
File File::forWriting(const std::string& path) {
  return {openOrFail(path, O_WRONLY | O_NONBLOCK, "cannot open for writing"), path};
}
File File::create(const std::string& path) {
  return {openOrFail(path, O_WRONLY | O_CREAT | O_EXCL, "cannot create"), path};
}

File::File(File&& other) noexcept : fd_(std::exchange(other.fd_, -1)), path_(std::move(other.path_)) {}

File::~File() {
  if (fd_ >= 0) ::close(fd_);
}

void File::readAt(void* to, size_t bytes, int64_t offset) const {
  auto* out = static_cast<char*>(to);
  while (bytes > 0) {
    const ssize_t got = ::pread(fd_, out, bytes < kMostBytes ? bytes : kMostBytes, static_cast<off_t>(offset));
    if (got < 0) {
      if (errno == EINTR) continue;
      fail(errno, path_, "cannot read");
    }
    VIADUCT_CHECK(got > 0, "ERR_IO", "file",
                  "expected " + std::to_string(bytes) + " more bytes at " + std::to_string(offset) + " of " + path_ +
                      ", got its end: it is cut or was changed while it was read");
    bytesRead.fetch_add(got, std::memory_order_relaxed);
    out += got;
    offset += got;
    bytes -= static_cast<size_t>(got);
  }
}

void File::writeAt(const void* from, size_t bytes, int64_t offset) const {
  const auto* in = static_cast<const char*>(from);
  while (bytes > 0) {
    const ssize_t put = ::pwrite(fd_, in, bytes < kMostBytes ? bytes : kMostBytes, static_cast<off_t>(offset));
    if (put < 0) {
      if (errno == EINTR) continue;
      fail(errno, path_, "cannot write");
    }
    bytesWritten.fetch_add(put, std::memory_order_relaxed);
    in += put;
    offset += put;
    bytes -= static_cast<size_t>(put);
  }
}

void File::reserve(int64_t bytes) const {
  if (bytes == 0) return;
#ifdef __linux__
  int error = 0;
  do {
    error = ::fallocate(fd_, 0, 0, static_cast<off_t>(bytes)) == 0 ? 0 : errno;
  } while (error == EINTR);
  if (error == 0) return;
  // File systems that cannot reserve say so; there a full disk shows at the write.
  if (error != EOPNOTSUPP && error != ENOSYS)
    fail(error, path_, "cannot reserve " + std::to_string(bytes) + " bytes for");
#endif
  if (::ftruncate(fd_, static_cast<off_t>(bytes)) != 0) fail(errno, path_, "cannot size");
}

void File::startWriteback() const {
#ifdef __linux__
  ::sync_file_range(fd_, 0, 0, SYNC_FILE_RANGE_WRITE);
#endif
}

Counters counters() { return {bytesRead.load(), bytesWritten.load()}; }

bool exchangePaths(const std::string& a, const std::string& b) {
#if defined(__linux__) && defined(SYS_renameat2)
  constexpr unsigned kExchange = 2;  // RENAME_EXCHANGE
  if (::syscall(SYS_renameat2, AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), kExchange) == 0) return true;
  if (errno == EINVAL || errno == ENOSYS || errno == EXDEV) return false;
  fail(errno, a, "cannot exchange with " + b + " the path");
#else
  (void)a;
  (void)b;
  return false;
#endif
}

bool tryLock(int fd) {
  int error = 0;
  do {
    error = ::flock(fd, LOCK_EX | LOCK_NB) == 0 ? 0 : errno;
  } while (error == EINTR);
  if (error == EWOULDBLOCK) return false;
  if (error != 0) fail(error, "descriptor " + std::to_string(fd), "cannot lock");
  return true;
}

}  // namespace viaduct::io
