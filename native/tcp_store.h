// The rendezvous store over TCP: a server on one thread, and clients. Wire format, all integers little-endian:
//   hello  "VIADUCT1" u32 n, n bytes of job id          -> u8 0 welcome, 1 another job
//   frame  u32 length, u8 op, u32 key length, key, rest -> u32 length, u8 status, rest
// A beat's key is a member's name; its rest is u32 ms, and the answer's lists members that were silent for so long, or are gone:
// u32 ms, u8 gone, u32 n, n bytes of name each.
// Whatever comes from a peer is bounded before it is kept; a peer that breaks the format is dropped, the others stay.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "comm.h"
#include "socket.h"

namespace viaduct {

namespace store {

constexpr char kHello[] = "VIADUCT1";
constexpr size_t kMostJob = 256;
constexpr size_t kMostKey = 4096;
constexpr size_t kMostValue = size_t{16} << 20;
constexpr size_t kMostFrame = kMostValue + kMostKey + 64;
constexpr size_t kMostStored = size_t{256} << 20;
constexpr size_t kMostPeers = 16384;
constexpr auto kHelloTime = std::chrono::seconds(10);

constexpr size_t kMostMember = 256;
constexpr size_t kMostSilent = 64;  // named in one answer
/// How often the server looks whom it has heard.
constexpr auto kLook = std::chrono::milliseconds(250);

enum Op : uint8_t { kSet = 1, kGet = 2, kAdd = 3, kCheck = 4, kBeat = 5, kLeave = 6 };
enum Status : uint8_t { kOk = 0, kMissing = 1, kRefused = 2 };

using Bytes = std::vector<uint8_t>;

void append32(Bytes& out, uint32_t v);
void append64(Bytes& out, uint64_t v);
uint32_t read32(const uint8_t* p);
uint64_t read64(const uint8_t* p);

/// A connection that the server has welcomed. Throws ERR_TIMEOUT, ERR_COMM.
Socket openConnection(const std::string& host, int port, const std::string& jobId, Deadline deadline);
/// A frame.
Bytes request(uint8_t op, const std::string& key, const Bytes& rest);
/// Status and rest of the next answer.
std::pair<uint8_t, Bytes> receiveAnswer(const Socket& socket, Deadline deadline);

}  // namespace store

/// Serves until it is destroyed.
class TcpStoreServer {
 public:
  /// Listens on `host` ("" for all addresses); port 0 takes a free one. Throws ERR_COMM when the port is taken.
  TcpStoreServer(const std::string& host, int port, std::string jobId);
  ~TcpStoreServer();
  int port() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// A store that can be left: close() breaks off every call in progress.
class ClosableStore : public Store {
 public:
  virtual void close() = 0;
  /// This host's address on the way to the server.
  virtual std::string localAddress() = 0;
};

/// Connects, waiting for the server to come up. A value is at most 16 MiB, a key 4096 bytes. Calls from several threads use
/// connections of their own. Throws ERR_TIMEOUT when nobody listens, ERR_COMM for another job's store.
std::unique_ptr<ClosableStore> connectTcpStore(const std::string& host, int port, const std::string& jobId,
                                               int64_t timeoutMs);

/// The same over the store that PyTorch's launcher keeps on MASTER_PORT; for small values. See torch_store.cc.
std::unique_ptr<ClosableStore> connectTorchStore(const std::string& host, int port, int64_t timeoutMs);

/// Connections of one client: each call takes one for itself.
class ConnectionPool {
 public:
  virtual ~ConnectionPool() = default;

 protected:
  virtual Socket open() = 0;
  /// Runs `call(socket, deadline)`; the connection goes back unless it threw.
  template <typename F>
  auto with(F&& call) {
    Lease lease(*this);
    auto result = call(static_cast<const Socket&>(*lease.socket));
    lease.good = true;
    return result;
  }
  void closeAll();
  std::string anyLocalAddress();
  void keep(Socket socket);

 private:
  struct Lease {
    explicit Lease(ConnectionPool& pool);
    ~Lease();
    ConnectionPool& pool;
    std::shared_ptr<Socket> socket;
    bool good = false;
  };
  std::mutex mutex_;
  bool closed_ = false;
  std::vector<std::shared_ptr<Socket>> idle_, busy_;
};

}  // namespace viaduct
