// Sockets between emulated GPUs; see nccl_links.h.
#include "nccl_links.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <deque>
#include <thread>

namespace viaduct::emulation {

namespace {

constexpr int kLookMs = 5;  // for an abort

/// An address without a file.
socklen_t addressOf(const std::string& id, int rank, sockaddr_un* address) {
  *address = {};
  address->sun_family = AF_UNIX;
  const std::string name = "viaduct-nccl-" + id + "-" + std::to_string(rank);
  const size_t length = std::min(name.size(), sizeof address->sun_path - 1);
  std::memcpy(address->sun_path + 1, name.data(), length);
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + length);
}

bool ready(int socket, short events) {
  pollfd p{socket, events, 0};
  return poll(&p, 1, kLookMs) > 0;
}

}  // namespace

NcclLinks::~NcclLinks() {
  for (int socket : sockets_) {
    if (socket >= 0) close(socket);
  }
}

void NcclLinks::connect(const std::string& id, int rank, int size) {
  rank_ = rank;
  size_ = size;
  sockets_.assign(static_cast<size_t>(size), -1);
  sockaddr_un address;
  const socklen_t own = addressOf(id, rank, &address);
  const int listening = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  const bool bound =
      bind(listening, reinterpret_cast<sockaddr*>(&address), own) == 0 && listen(listening, size + 1) == 0;
  struct Close {
    int socket;
    ~Close() { close(socket); }
  } closing{listening};
  if (!bound) throw LinksBroken();
  for (int peer = 0; peer < rank; ++peer) {
    const int made = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockets_[static_cast<size_t>(peer)] = made;
    const socklen_t length = addressOf(id, peer, &address);
    while (::connect(made, reinterpret_cast<sockaddr*>(&address), length) != 0) {  // it may not be there yet
      if (aborted_) throw LinksBroken();
      std::this_thread::sleep_for(std::chrono::milliseconds(kLookMs));
    }
    if (send(made, &rank, sizeof rank, MSG_NOSIGNAL) != sizeof rank) throw LinksBroken();
  }
  for (int missing = size - 1 - rank; missing > 0; --missing) {
    int made = -1;
    while (!ready(listening, POLLIN) || (made = accept4(listening, nullptr, nullptr, SOCK_CLOEXEC)) < 0) {
      if (aborted_) throw LinksBroken();
    }
    int peer = -1;
    if (recv(made, &peer, sizeof peer, MSG_WAITALL) != sizeof peer || peer <= rank || peer >= size) throw LinksBroken();
    sockets_[static_cast<size_t>(peer)] = made;
  }
  for (int socket : sockets_) {
    if (socket >= 0) fcntl(socket, F_SETFL, fcntl(socket, F_GETFL) | O_NONBLOCK);
  }
}

void NcclLinks::exchange(const std::vector<Part>& parts) {
  struct Queue {
    std::deque<Part> parts;
    size_t done = 0;  // bytes of the first
  };
  std::vector<Queue> sends(sockets_.size()), recvs(sockets_.size());
  for (const Part& part : parts) {
    if (part.bytes > 0) (part.send ? sends : recvs)[static_cast<size_t>(part.peer)].parts.push_back(part);
  }
  // To itself.
  auto& from = sends[static_cast<size_t>(rank_)].parts;
  auto& to = recvs[static_cast<size_t>(rank_)].parts;
  for (; !from.empty() && !to.empty(); from.pop_front(), to.pop_front()) {
    std::memmove(to.front().data, from.front().data, std::min(to.front().bytes, from.front().bytes));
  }
  from.clear();
  to.clear();
  const auto move = [](Queue& queue, int socket, bool out) {
    while (!queue.parts.empty()) {
      const Part& part = queue.parts.front();
      char* at = static_cast<char*>(part.data) + queue.done;
      const size_t left = part.bytes - queue.done;
      const ssize_t n = out ? send(socket, at, left, MSG_NOSIGNAL) : recv(socket, at, left, 0);
      if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
      if (n <= 0) throw LinksBroken();
      queue.done += static_cast<size_t>(n);
      if (queue.done == part.bytes) {
        queue.parts.pop_front();
        queue.done = 0;
      }
    }
  };
  for (;;) {
    std::vector<pollfd> waiting;
    for (size_t p = 0; p < sockets_.size(); ++p) {
      if (sockets_[p] < 0) continue;
      move(sends[p], sockets_[p], true);
      move(recvs[p], sockets_[p], false);
      const int events = (sends[p].parts.empty() ? 0 : POLLOUT) | (recvs[p].parts.empty() ? 0 : POLLIN);
      if (events != 0) waiting.push_back({sockets_[p], static_cast<short>(events), 0});
    }
    if (waiting.empty()) return;
    if (aborted_) throw LinksBroken();
    poll(waiting.data(), waiting.size(), kLookMs);
  }
}

}  // namespace viaduct::emulation
