// The store's server: one thread, poll(), no blocking. A get of a key that is not there waits in a list.
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <map>
#include <thread>

#include "errors.h"
#include "tcp_store.h"

namespace viaduct {

using namespace store;
using Clock = std::chrono::steady_clock;

namespace {

struct Peer {
  Socket socket;
  bool welcome = false;
  bool waiting = false;  // a get that was not answered yet: no further frame is read
  std::string key;       // of that get
  std::string member;    // whose beats come this way
  Clock::time_point until;
  Clock::time_point came;
  Bytes in, out;
  size_t sent = 0;
};

/// Silence is counted in looks: time in which this process had no turn makes nobody silent.
struct Member {
  std::chrono::milliseconds silent{0};
  size_t connections = 0;
};

constexpr auto kForget = std::chrono::hours(1);  // members that are gone

}  // namespace

struct TcpStoreServer::Impl {
  Socket listener;
  std::string jobId;
  int wake[2] = {-1, -1};
  std::deque<Peer> peers;
  std::map<std::string, Bytes> values;
  size_t stored = 0;
  std::map<std::string, Member> members;
  Clock::time_point looked;
  std::thread thread;

  void loop();
  void accept();
  /// False: drop the peer.
  bool read(Peer& peer);
  bool write(Peer& peer);
  bool handle(Peer& peer);
  bool frame(Peer& peer, const uint8_t* body, size_t bytes);
  void answer(Peer& peer, uint8_t status, const Bytes& rest);
  bool store(const std::string& key, Bytes value);
  void wakeWaiters(const std::string& key);
  bool beat(Peer& peer, const std::string& member, uint32_t leastMs);
  /// The peer is no member any more.
  void release(Peer& peer);
  void look();
};

TcpStoreServer::TcpStoreServer(const std::string& host, int port, std::string jobId) : impl_(std::make_unique<Impl>()) {
  VIADUCT_CHECK(jobId.size() <= kMostJob, "ERR_COMM", "store", "expected a job id of at most 256 bytes");
  impl_->listener = Socket::listen(host, port);
  impl_->jobId = std::move(jobId);
  if (pipe2(impl_->wake, O_CLOEXEC | O_NONBLOCK) != 0) {
    throw Error("ERR_COMM", "store", std::string("pipe: ") + std::strerror(errno));
  }
  impl_->thread = std::thread([impl = impl_.get()] { impl->loop(); });
}

TcpStoreServer::~TcpStoreServer() {
  const char byte = 0;
  if (::write(impl_->wake[1], &byte, 1) < 0) {
    // The pipe is full: the thread is being woken already.
  }
  impl_->thread.join();
  ::close(impl_->wake[0]);
  ::close(impl_->wake[1]);
}

int TcpStoreServer::port() const { return impl_->listener.port(); }

void TcpStoreServer::Impl::loop() {
  std::vector<pollfd> fds;
  for (;;) {
    fds.clear();
    fds.push_back({wake[0], POLLIN, 0});
    const bool full = peers.size() >= kMostPeers;
    fds.push_back({listener.fd(), static_cast<short>(full ? 0 : POLLIN), 0});
    auto next = members.empty() ? Clock::now() + std::chrono::hours(1) : looked + kLook;
    for (Peer& peer : peers) {
      // While a get waits only the end of the connection matters; while an answer is unread nothing more is taken.
      const bool reading = !peer.waiting && peer.out.size() - peer.sent < kMostFrame;
      const bool writing = peer.sent < peer.out.size();
      fds.push_back(
          {peer.socket.fd(), static_cast<short>((reading ? POLLIN : POLLRDHUP) | (writing ? POLLOUT : 0)), 0});
      if (peer.waiting) next = std::min(next, peer.until);
      if (!peer.welcome) next = std::min(next, peer.came + kHelloTime);
    }
    const auto rest = std::chrono::duration_cast<std::chrono::milliseconds>(next - Clock::now()).count() + 1;
    if (poll(fds.data(), fds.size(), static_cast<int>(std::clamp<int64_t>(rest, 0, 3600000))) < 0 && errno != EINTR) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));  // out of kernel memory: try again
      continue;
    }
    if (fds[0].revents != 0) return;
    const auto now = Clock::now();
    for (size_t i = 0; i < peers.size(); ++i) {
      Peer& peer = peers[i];
      const short events = fds[i + 2].revents;
      bool keep = (events & (POLLERR | POLLNVAL)) == 0;
      try {
        if (keep && (events & (POLLIN | POLLHUP | POLLRDHUP)) != 0) keep = read(peer);
        if (keep && peer.waiting && now >= peer.until) {
          peer.waiting = false;
          answer(peer, kMissing, {});
          keep = handle(peer);
        }
        if (keep && peer.sent < peer.out.size()) keep = write(peer);
      } catch (const std::exception&) {
        keep = false;  // no memory for it: this peer goes, the store stays
      }
      if (!peer.welcome && now >= peer.came + kHelloTime) keep = false;
      if (!keep) {
        release(peer);
        peer.socket.close();
      }
    }
    if (!members.empty()) look();
    try {
      if (fds[1].revents != 0) accept();
    } catch (const std::exception&) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));  // no memory for one more peer
    }
    peers.erase(std::remove_if(peers.begin(), peers.end(), [](const Peer& p) { return !p.socket; }), peers.end());
  }
}

void TcpStoreServer::Impl::accept() {
  for (;;) {
    const int fd = accept4(listener.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) {
      if (errno == EMFILE || errno == ENFILE) std::this_thread::sleep_for(std::chrono::milliseconds(10));
      return;
    }
    const int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
    Peer peer;
    peer.socket = Socket(fd);
    peer.came = Clock::now();
    peers.push_back(std::move(peer));
    if (peers.size() >= kMostPeers) return;
  }
}

bool TcpStoreServer::Impl::read(Peer& peer) {
  uint8_t buffer[65536];
  for (;;) {
    const ssize_t n = ::recv(peer.socket.fd(), buffer, peer.waiting ? 1 : sizeof buffer, 0);
    if (n == 0) return false;
    if (n < 0) {
      if (errno == EINTR) continue;
      return errno == EAGAIN || errno == EWOULDBLOCK;
    }
    if (peer.waiting) return false;  // a client asks one thing at a time
    peer.in.insert(peer.in.end(), buffer, buffer + n);
    if (!handle(peer)) return false;
    if (peer.waiting || static_cast<size_t>(n) < sizeof buffer) return true;
  }
}

bool TcpStoreServer::Impl::write(Peer& peer) {
  while (peer.sent < peer.out.size()) {
    const ssize_t n = ::send(peer.socket.fd(), peer.out.data() + peer.sent, peer.out.size() - peer.sent, MSG_NOSIGNAL);
    if (n > 0) {
      peer.sent += static_cast<size_t>(n);
    } else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      return true;
    } else if (n == 0 || errno != EINTR) {
      return false;
    }
  }
  Bytes().swap(peer.out);
  peer.sent = 0;
  return true;
}

/// Takes whole frames from what has come in.
bool TcpStoreServer::Impl::handle(Peer& peer) {
  size_t at = 0;
  constexpr size_t kHead = sizeof kHello - 1 + 4;
  if (!peer.welcome) {
    const size_t known = std::min(peer.in.size(), sizeof kHello - 1);
    if (std::memcmp(peer.in.data(), kHello, known) != 0) return false;
    if (peer.in.size() < kHead) return true;
    const uint32_t n = read32(peer.in.data() + sizeof kHello - 1);
    if (n > kMostJob) return false;
    if (peer.in.size() < kHead + n) return true;
    const std::string theirs(peer.in.begin() + kHead, peer.in.begin() + static_cast<ptrdiff_t>(kHead + n));
    const bool same = theirs == jobId;
    peer.out.push_back(same ? 0 : 1);
    if (!same) {
      write(peer);
      return false;
    }
    peer.welcome = true;
    at = kHead + n;
  }
  while (!peer.waiting && peer.in.size() - at >= 4) {
    const uint32_t n = read32(peer.in.data() + at);
    if (n > kMostFrame || n < 5) return false;
    if (peer.in.size() - at - 4 < n) break;
    if (!frame(peer, peer.in.data() + at + 4, n)) return false;
    at += 4 + n;
  }
  peer.in.erase(peer.in.begin(), peer.in.begin() + static_cast<ptrdiff_t>(at));
  return true;
}

bool TcpStoreServer::Impl::frame(Peer& peer, const uint8_t* body, size_t bytes) {
  const uint8_t op = body[0];
  const size_t keyBytes = read32(body + 1);
  if (keyBytes > kMostKey || keyBytes > bytes - 5) return false;
  const std::string key(reinterpret_cast<const char*>(body + 5), keyBytes);
  const uint8_t* rest = body + 5 + keyBytes;
  const size_t restBytes = bytes - 5 - keyBytes;
  const auto found = values.find(key);
  switch (op) {
    case kSet: {
      if (restBytes > kMostValue) return false;
      const bool ok = store(key, Bytes(rest, rest + restBytes));
      answer(peer, ok ? kOk : kRefused, {});
      if (ok) wakeWaiters(key);
      return true;
    }
    case kGet: {
      if (restBytes != 8) return false;
      if (found != values.end()) {
        answer(peer, kOk, found->second);
        return true;
      }
      const uint64_t ms = std::min<uint64_t>(read64(rest), uint64_t{1000} * 3600 * 24 * 30);
      peer.waiting = true;
      peer.key = key;
      peer.until = Clock::now() + std::chrono::milliseconds(ms);
      return true;
    }
    case kAdd: {
      if (restBytes != 8) return false;
      uint64_t value = read64(rest);
      if (found != values.end()) {
        if (found->second.size() != 8) {
          answer(peer, kRefused, {});
          return true;
        }
        value += read64(found->second.data());
      }
      Bytes bytesOfValue;
      append64(bytesOfValue, value);
      const bool ok = store(key, bytesOfValue);
      answer(peer, ok ? kOk : kRefused, ok ? bytesOfValue : Bytes());
      if (ok) wakeWaiters(key);
      return true;
    }
    case kCheck:
      answer(peer, found != values.end() ? kOk : kMissing, {});
      return true;
    case kBeat:
      if (restBytes != 4 || key.empty() || key.size() > kMostMember) return false;
      return beat(peer, key, read32(rest));
    case kLeave:
      if (restBytes != 0 || key.empty()) return false;
      release(peer);
      members.erase(key);
      answer(peer, kOk, {});
      return true;
    default:
      return false;
  }
}

void TcpStoreServer::Impl::answer(Peer& peer, uint8_t status, const Bytes& rest) {
  append32(peer.out, static_cast<uint32_t>(1 + rest.size()));
  peer.out.push_back(status);
  peer.out.insert(peer.out.end(), rest.begin(), rest.end());
}

bool TcpStoreServer::Impl::store(const std::string& key, Bytes value) {
  const auto found = values.find(key);
  const size_t before = found == values.end() ? 0 : key.size() + found->second.size();
  const size_t after = key.size() + value.size();
  if (stored - before + after > kMostStored) return false;
  stored = stored - before + after;
  values[key] = std::move(value);
  return true;
}

void TcpStoreServer::Impl::wakeWaiters(const std::string& key) {
  for (Peer& peer : peers) {
    if (!peer.waiting || !peer.socket || peer.key != key) continue;
    peer.waiting = false;
    answer(peer, kOk, values[key]);
    if (!write(peer)) peer.socket.interrupt();
  }
}

bool TcpStoreServer::Impl::beat(Peer& peer, const std::string& member, uint32_t leastMs) {
  if (peer.member != member) {
    release(peer);
    if (members.size() >= kMostPeers && members.count(member) == 0) {
      answer(peer, kRefused, {});
      return true;
    }
    if (members.empty()) looked = Clock::now();
    ++members[member].connections;
    peer.member = member;
  }
  members[member].silent = std::chrono::milliseconds(0);
  Bytes silent;
  size_t named = 0;
  for (const auto& [name, other] : members) {
    if (other.connections > 0 && other.silent.count() < leastMs) continue;
    if (++named > kMostSilent) break;
    append32(silent, static_cast<uint32_t>(other.silent.count()));
    silent.push_back(other.connections == 0);
    append32(silent, static_cast<uint32_t>(name.size()));
    silent.insert(silent.end(), name.begin(), name.end());
  }
  answer(peer, kOk, silent);
  return true;
}

void TcpStoreServer::Impl::release(Peer& peer) {
  const auto found = members.find(peer.member);
  if (found != members.end() && found->second.connections > 0) --found->second.connections;
  peer.member.clear();
}

/// Called when all that has come was read.
void TcpStoreServer::Impl::look() {
  const auto now = Clock::now();
  if (now < looked + kLook) return;
  const auto passed = std::chrono::duration_cast<std::chrono::milliseconds>(now - looked);
  looked = now;
  for (auto it = members.begin(); it != members.end();) {
    it->second.silent += std::min<std::chrono::milliseconds>(passed, 2 * kLook);
    const bool forgotten = it->second.connections == 0 && it->second.silent > kForget;
    it = forgotten ? members.erase(it) : std::next(it);
  }
}

}  // namespace viaduct
