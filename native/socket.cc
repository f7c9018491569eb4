// TCP over poll(): sockets do not block, waits end at deadlines.
#include "socket.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <thread>

#include "errors.h"

namespace viaduct {
namespace {

using Clock = std::chrono::steady_clock;

std::string endpoint(const std::string& host, int port) { return host + ":" + std::to_string(port); }

void prepare(int fd) {
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL, 0) | O_NONBLOCK);
  fcntl(fd, F_SETFD, FD_CLOEXEC);
  const int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

/// False at the deadline.
bool waitFor(int fd, short events, Deadline deadline) {
  for (;;) {
    const auto rest = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    pollfd p{fd, events, 0};
    const int n = poll(&p, 1, static_cast<int>(std::clamp<int64_t>(rest, 0, 3600000)));
    if (n > 0) return true;
    if (n < 0 && errno != EINTR) throw Error("ERR_COMM", "socket", std::string("poll: ") + std::strerror(errno));
    if (n == 0 && Clock::now() >= deadline) return false;
  }
}

struct Addresses {
  addrinfo* list = nullptr;
  ~Addresses() {
    if (list != nullptr) freeaddrinfo(list);
  }
};

std::string resolve(const std::string& host, int port, bool passive, Addresses& out) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = passive ? AI_PASSIVE : 0;
  const int rc = getaddrinfo(host.empty() ? nullptr : host.c_str(), std::to_string(port).c_str(), &hints, &out.list);
  return rc == 0 ? "" : gai_strerror(rc);
}

}  // namespace

Socket& Socket::operator=(Socket&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

void Socket::close() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

void Socket::interrupt() const {
  if (fd_ >= 0) ::shutdown(fd_, SHUT_RDWR);
}

Socket Socket::connect(const std::string& host, int port, Deadline deadline) {
  std::string why;
  for (;;) {
    Addresses addresses;
    why = resolve(host, port, false, addresses);
    for (addrinfo* a = addresses.list; a != nullptr; a = a->ai_next) {
      Socket s(::socket(a->ai_family, a->ai_socktype, a->ai_protocol));
      if (!s) continue;
      prepare(s.fd());
      int error = 0;
      if (::connect(s.fd(), a->ai_addr, a->ai_addrlen) != 0) {
        error = errno;
        if (error == EINPROGRESS) {
          const auto soon = std::min(deadline, Clock::now() + std::chrono::seconds(5));
          socklen_t size = sizeof error;
          error = ETIMEDOUT;
          if (waitFor(s.fd(), POLLOUT, soon)) getsockopt(s.fd(), SOL_SOCKET, SO_ERROR, &error, &size);
        }
      }
      if (error == 0) return s;
      why = std::strerror(error);
    }
    if (Clock::now() >= deadline) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  throw Error("ERR_TIMEOUT", "connect",
              "expected a listener at " + endpoint(host, port) + ", got: " + why +
                  ": see whether rank 0 or the launcher runs there and the address is right");
}

Socket Socket::listen(const std::string& host, int port) {
  Addresses addresses;
  std::string why = resolve(host, port, true, addresses);
  for (addrinfo* a = addresses.list; a != nullptr; a = a->ai_next) {
    Socket s(::socket(a->ai_family, a->ai_socktype, a->ai_protocol));
    if (!s) continue;
    prepare(s.fd());
    const int one = 1, zero = 0;
    setsockopt(s.fd(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (a->ai_family == AF_INET6) setsockopt(s.fd(), IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof zero);
    if (::bind(s.fd(), a->ai_addr, a->ai_addrlen) == 0 && ::listen(s.fd(), 1024) == 0) return s;
    why = std::strerror(errno);
  }
  throw Error("ERR_COMM", "listen",
              "expected to listen on port " + std::to_string(port) + (host.empty() ? "" : " of " + host) +
                  ", got: " + why + ": choose another port (--master-port, MASTER_PORT), or 0 for a free one");
}

void Socket::send(const void* data, size_t bytes, Deadline deadline) const {
  const char* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::send(fd_, from, bytes, MSG_NOSIGNAL);
    if (n > 0) {
      from += n;
      bytes -= static_cast<size_t>(n);
    } else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      if (!waitFor(fd_, POLLOUT, deadline)) throw Error("ERR_TIMEOUT", "socket", "the other side takes no bytes");
    } else if (n == 0 || errno != EINTR) {
      throw Error("ERR_COMM", "socket", std::string("the connection broke: ") + std::strerror(errno));
    }
  }
}

void Socket::receive(void* data, size_t bytes, Deadline deadline) const {
  char* to = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::recv(fd_, to, bytes, 0);
    if (n > 0) {
      to += n;
      bytes -= static_cast<size_t>(n);
    } else if (n == 0) {
      throw Error("ERR_COMM", "socket", "the other side closed the connection");
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      if (!waitFor(fd_, POLLIN, deadline)) throw Error("ERR_TIMEOUT", "socket", "no answer came");
    } else if (errno != EINTR) {
      throw Error("ERR_COMM", "socket", std::string("the connection broke: ") + std::strerror(errno));
    }
  }
}

bool Socket::readable(Deadline deadline) const { return waitFor(fd_, POLLIN, deadline); }

namespace {

sockaddr_storage nameOf(int fd) {
  sockaddr_storage name{};
  socklen_t size = sizeof name;
  getsockname(fd, reinterpret_cast<sockaddr*>(&name), &size);
  return name;
}

}  // namespace

int Socket::port() const {
  const sockaddr_storage name = nameOf(fd_);
  if (name.ss_family == AF_INET6) return ntohs(reinterpret_cast<const sockaddr_in6*>(&name)->sin6_port);
  return ntohs(reinterpret_cast<const sockaddr_in*>(&name)->sin_port);
}

std::string Socket::localAddress() const {
  const sockaddr_storage name = nameOf(fd_);
  char text[INET6_ADDRSTRLEN] = {};
  if (name.ss_family == AF_INET6) {
    const auto& address = reinterpret_cast<const sockaddr_in6*>(&name)->sin6_addr;
    if (IN6_IS_ADDR_V4MAPPED(&address)) {
      inet_ntop(AF_INET, address.s6_addr + 12, text, sizeof text);
    } else {
      inet_ntop(AF_INET6, &address, text, sizeof text);
    }
  } else {
    inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(&name)->sin_addr, text, sizeof text);
  }
  return text;
}

}  // namespace viaduct
