// A minimal client of the store that PyTorch's launcher keeps on MASTER_PORT, used to tell the ranks where Viaduct's own
// store listens. What it speaks: a byte for the query, strings and vectors as u64 length and bytes, integers as they lie in
// memory; a connection begins with query VALIDATE and a magic number. Query numbers: torch/csrc/distributed/c10d/TCPStoreBackend.hpp.
#include <algorithm>
#include <thread>

#include "errors.h"
#include "tcp_store.h"

namespace viaduct {
namespace {

using Clock = std::chrono::steady_clock;
using Bytes = std::vector<uint8_t>;

enum Query : uint8_t { kValidate = 0, kSet = 1, kGet = 3, kAdd = 4, kCheck = 5 };
constexpr uint32_t kMagic = 0x3C85F7CE;
constexpr uint8_t kReady = 0;
constexpr uint64_t kMostValue = uint64_t{1} << 20;
constexpr auto kAnswerTime = std::chrono::seconds(30);

template <typename T>
void append(Bytes& out, T value) {
  const auto* p = reinterpret_cast<const uint8_t*>(&value);
  out.insert(out.end(), p, p + sizeof value);
}
void appendText(Bytes& out, const std::string& text) {
  append<uint64_t>(out, text.size());
  out.insert(out.end(), text.begin(), text.end());
}

class TorchStore final : public ClosableStore, private ConnectionPool {
 private:
  Socket open() override {
    const auto deadline = Clock::now() + std::chrono::milliseconds(connectMs_);
    Socket socket = Socket::connect(host_, port_, deadline);
    Bytes hello{kValidate};
    append(hello, kMagic);
    socket.send(hello.data(), hello.size(), deadline + std::chrono::seconds(1));
    return socket;
  }

  template <typename F>
  auto ask(const std::string& key, const Bytes& query, F&& answer) {
    try {
      return with([&](const Socket& socket) {
        const auto until = Clock::now() + kAnswerTime;
        socket.send(query.data(), query.size(), until);
        return answer(socket, until);
      });
    } catch (const Error& e) {
      if (e.where != "socket") throw;
      throw Error(e.code, "store",
                  "expected torchrun's store at " + host_ + ":" + std::to_string(port_) + " to answer about " + key +
                      ", but " + e.what() +
                      ": set VIADUCT_MASTER_PORT to a free port of rank 0's host to do without it");
    }
  }

 public:
  TorchStore(std::string host, int port, int64_t timeoutMs)
      : host_(std::move(host)), port_(port), connectMs_(timeoutMs) {
    keep(open());
  }

  void set(const std::string& key, const Bytes& value) override {
    Bytes query{kSet};
    appendText(query, key);
    append<uint64_t>(query, value.size());
    query.insert(query.end(), value.begin(), value.end());
    ask(key, query, [](const Socket&, Deadline) { return 0; });
    check(key);  // a set has no answer: this one comes after it
  }

  Bytes get(const std::string& key, int64_t timeoutMs) override {
    const auto deadline = Clock::now() + std::chrono::milliseconds(timeoutMs);
    while (!check(key)) {
      if (Clock::now() >= deadline) {
        throw Error("ERR_TIMEOUT", "store",
                    "expected the key " + key + " within " + std::to_string(timeoutMs) +
                        " ms in torchrun's store, but no rank has set it: see the output of rank 0");
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    Bytes query{kGet};
    appendText(query, key);
    return ask(key, query, [](const Socket& socket, Deadline until) {
      uint64_t n = 0;
      socket.receive(&n, sizeof n, until);
      VIADUCT_CHECK(n <= kMostValue, "ERR_COMM", "store",
                    "torchrun's store answered with " + std::to_string(n) + " bytes");
      Bytes value(n);
      socket.receive(value.data(), value.size(), until);
      return value;
    });
  }

  int64_t add(const std::string& key, int64_t amount) override {
    Bytes query{kAdd};
    appendText(query, key);
    append<int64_t>(query, amount);
    return ask(key, query, [](const Socket& socket, Deadline until) {
      int64_t value = 0;
      socket.receive(&value, sizeof value, until);
      return value;
    });
  }

  bool check(const std::string& key) override {
    Bytes query{kCheck};
    append<uint64_t>(query, 1);
    appendText(query, key);
    return ask(key, query, [](const Socket& socket, Deadline until) {
      uint8_t state = 1;
      socket.receive(&state, 1, until);
      return state == kReady;
    });
  }

  void close() override { closeAll(); }
  std::string localAddress() override { return anyLocalAddress(); }

 private:
  const std::string host_;
  const int port_;
  const int64_t connectMs_;
};

}  // namespace

std::unique_ptr<ClosableStore> connectTorchStore(const std::string& host, int port, int64_t timeoutMs) {
  return std::make_unique<TorchStore>(host, port, timeoutMs);
}

}  // namespace viaduct
