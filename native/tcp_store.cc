// Clients of the rendezvous store. The server is in tcp_store_server.cc.
#include "tcp_store.h"

#include <algorithm>
#include <cstring>

#include "errors.h"

namespace viaduct {

using Clock = std::chrono::steady_clock;
using store::Bytes;

namespace store {

void append32(Bytes& out, uint32_t v) {
  for (int i = 0; i < 4; ++i) out.push_back(static_cast<uint8_t>(v >> (8 * i)));
}

void append64(Bytes& out, uint64_t v) {
  for (int i = 0; i < 8; ++i) out.push_back(static_cast<uint8_t>(v >> (8 * i)));
}

uint32_t read32(const uint8_t* p) {
  return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16 |
         static_cast<uint32_t>(p[3]) << 24;
}

uint64_t read64(const uint8_t* p) { return read32(p) | static_cast<uint64_t>(read32(p + 4)) << 32; }

Socket openConnection(const std::string& host, int port, const std::string& jobId, Deadline deadline) {
  Socket socket = Socket::connect(host, port, deadline);
  Bytes hello(kHello, kHello + sizeof kHello - 1);
  append32(hello, static_cast<uint32_t>(jobId.size()));
  hello.insert(hello.end(), jobId.begin(), jobId.end());
  uint8_t welcome = 1;
  const auto patience = std::min(deadline, Clock::now() + kHelloTime) + std::chrono::seconds(1);
  const std::string place = host + ":" + std::to_string(port);
  try {
    socket.send(hello.data(), hello.size(), patience);
    socket.receive(&welcome, 1, patience);
  } catch (const Error& e) {
    throw Error(e.code, "store",
                "expected Viaduct's store at " + place + ", but " + e.what() +
                    ": another program listens there, choose another port");
  }
  VIADUCT_CHECK(welcome == 0, "ERR_COMM", "store",
                "expected the store of job " + jobId + " at " + place + ", got another job's: choose another port");
  return socket;
}

Bytes request(uint8_t op, const std::string& key, const Bytes& rest) {
  VIADUCT_CHECK(key.size() <= kMostKey, "ERR_COMM", "store", "expected a key of at most 4096 bytes");
  Bytes frame;
  append32(frame, static_cast<uint32_t>(5 + key.size() + rest.size()));
  frame.push_back(op);
  append32(frame, static_cast<uint32_t>(key.size()));
  frame.insert(frame.end(), key.begin(), key.end());
  frame.insert(frame.end(), rest.begin(), rest.end());
  return frame;
}

std::pair<uint8_t, Bytes> receiveAnswer(const Socket& socket, Deadline deadline) {
  uint8_t head[4];
  socket.receive(head, 4, deadline);
  const uint32_t n = read32(head);
  VIADUCT_CHECK(n >= 1 && n <= kMostFrame, "ERR_COMM", "store", "the server's answer is broken");
  Bytes body(n);
  socket.receive(body.data(), n, deadline);
  return {body[0], Bytes(body.begin() + 1, body.end())};
}

}  // namespace store

ConnectionPool::Lease::Lease(ConnectionPool& pool) : pool(pool) {
  {
    std::lock_guard<std::mutex> lock(pool.mutex_);
    if (!pool.idle_.empty()) {
      socket = std::move(pool.idle_.back());
      pool.idle_.pop_back();
    }
  }
  if (!socket) socket = std::make_shared<Socket>(pool.open());
  std::lock_guard<std::mutex> lock(pool.mutex_);
  if (pool.closed_) throw Error("ERR_ABORTED", "store", "the store was closed");
  pool.busy_.push_back(socket);
}

ConnectionPool::Lease::~Lease() {
  if (!socket) return;
  std::lock_guard<std::mutex> lock(pool.mutex_);
  auto& busy = pool.busy_;
  busy.erase(std::remove(busy.begin(), busy.end(), socket), busy.end());
  if (good && !pool.closed_) pool.idle_.push_back(std::move(socket));
}

void ConnectionPool::closeAll() {
  std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  for (const auto& socket : busy_) socket->interrupt();
  idle_.clear();
}

void ConnectionPool::keep(Socket socket) {
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::make_shared<Socket>(std::move(socket)));
}

std::string ConnectionPool::anyLocalAddress() {
  return with([](const Socket& socket) { return socket.localAddress(); });
}

namespace {

using namespace store;

constexpr auto kAnswerTime = std::chrono::seconds(60);  // for what the server answers at once

class TcpStore final : public ClosableStore, private ConnectionPool {
 public:
  TcpStore(std::string host, int port, std::string jobId, int64_t timeoutMs)
      : host_(std::move(host)), port_(port), jobId_(std::move(jobId)), connectMs_(timeoutMs) {
    keep(open());
    connectMs_ = std::min<int64_t>(connectMs_, 10000);  // it was there: later connections come at once
  }

  void set(const std::string& key, const Bytes& value) override {
    VIADUCT_CHECK(value.size() <= kMostValue, "ERR_COMM", "store",
                  "expected a value of at most 16 MiB for " + key + ", got " + std::to_string(value.size()) + " bytes");
    if (request(kSet, key, value, kAnswerTime).first != kOk) refused(key);
  }

  Bytes get(const std::string& key, int64_t timeoutMs) override {
    const auto ms = static_cast<uint64_t>(std::max<int64_t>(0, timeoutMs));
    auto answer = request(kGet, key, word(ms), std::chrono::milliseconds(ms) + std::chrono::seconds(10));
    if (answer.first == kMissing) {
      throw Error("ERR_TIMEOUT", "store",
                  "expected the key " + key + " within " + std::to_string(ms) +
                      " ms, but no rank has set it: see the "
                      "output of the rank that should");
    }
    return std::move(answer.second);
  }

  int64_t add(const std::string& key, int64_t amount) override {
    const auto answer = request(kAdd, key, word(static_cast<uint64_t>(amount)), kAnswerTime);
    if (answer.first != kOk || answer.second.size() != 8) refused(key);
    return static_cast<int64_t>(read64(answer.second.data()));
  }

  bool check(const std::string& key) override { return request(kCheck, key, {}, kAnswerTime).first == kOk; }

  void close() override { closeAll(); }
  std::string localAddress() override { return anyLocalAddress(); }

 private:
  static Bytes word(uint64_t v) {
    Bytes out;
    append64(out, v);
    return out;
  }
  [[noreturn]] static void refused(const std::string& key) {
    throw Error("ERR_COMM", "store", "the server refused " + key + ": it is full, or the key holds no counter");
  }

  Socket open() override {
    return openConnection(host_, port_, jobId_, Clock::now() + std::chrono::milliseconds(connectMs_));
  }

  std::pair<uint8_t, Bytes> request(uint8_t op, const std::string& key, const Bytes& rest,
                                    std::chrono::milliseconds most) {
    const Bytes frame = store::request(op, key, rest);
    try {
      return with([&](const Socket& socket) {
        const auto deadline = Clock::now() + most;
        socket.send(frame.data(), frame.size(), deadline);
        return receiveAnswer(socket, deadline);
      });
    } catch (const Error& e) {
      if (e.where != "socket") throw;
      throw Error(e.code, "store",
                  "expected an answer about " + key + " from " + host_ + ":" + std::to_string(port_) + ", but " +
                      e.what() + ": see whether rank 0 or the launcher still runs");
    }
  }

  const std::string host_;
  const int port_;
  const std::string jobId_;
  int64_t connectMs_;
};

}  // namespace

std::unique_ptr<ClosableStore> connectTcpStore(const std::string& host, int port, const std::string& jobId,
                                               int64_t timeoutMs) {
  return std::make_unique<TcpStore>(host, port, jobId, timeoutMs);
}

}  // namespace viaduct
