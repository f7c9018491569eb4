// Blocking TCP with deadlines, for the stores. Every wait can be broken off from another thread by interrupt().
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

namespace viaduct {

using Deadline = std::chrono::steady_clock::time_point;

/// Owns a socket. Failures throw Error: ERR_TIMEOUT past the deadline, ERR_COMM for all else.
class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  Socket& operator=(Socket&& other) noexcept;
  ~Socket() { close(); }

  /// Tries until the deadline: the other side may still be starting.
  static Socket connect(const std::string& host, int port, Deadline deadline);
  /// Listens on `host` ("" for all addresses); port 0 takes a free one. Not blocking.
  static Socket listen(const std::string& host, int port);

  int fd() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void close();
  /// From any thread: reads and writes in progress fail.
  void interrupt() const;

  void send(const void* data, size_t bytes, Deadline deadline) const;
  void receive(void* data, size_t bytes, Deadline deadline) const;
  /// Whether there is something to read, or the end, before the deadline.
  bool readable(Deadline deadline) const;

  /// The port and the address of this side.
  int port() const;
  std::string localAddress() const;

 private:
  int fd_ = -1;
};

}  // namespace viaduct
