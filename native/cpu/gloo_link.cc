// Transfers over Gloo's unbound buffers: each transfer has a slot that is a hash of its group, operation, step and length, so
// ranks that run different programs never exchange bytes; they time out. After a failure the connections are closed.
#include "gloo_link.h"

#include "../errors.h"

#ifdef VIADUCT_HAVE_GLOO

#include <gloo/common/error.h>
#include <gloo/rendezvous/context.h>
#include <gloo/rendezvous/store.h>
#include <gloo/transport/tcp/device.h>
#include <gloo/transport/unbound_buffer.h>

#include <algorithm>
#include <mutex>
#include <set>

namespace viaduct::cpu {
namespace {

using Milliseconds = std::chrono::milliseconds;

Milliseconds left(Clock::time_point deadline) {
  const auto rest = std::chrono::duration_cast<Milliseconds>(deadline - Clock::now());
  return std::max(rest, Milliseconds(1));  // 0 would mean "for ever" to Gloo
}

/// Gloo's view of our store, below a prefix.
class GlooStore final : public gloo::rendezvous::Store {
 public:
  GlooStore(viaduct::Store& store, std::string prefix, Clock::time_point deadline)
      : store_(store), prefix_(std::move(prefix)), deadline_(deadline) {}
  void set(const std::string& key, const std::vector<char>& data) override {
    store_.set(prefix_ + key, std::vector<uint8_t>(data.begin(), data.end()));
  }
  std::vector<char> get(const std::string& key) override {
    const auto data = store_.get(prefix_ + key, left(deadline_).count());
    return {data.begin(), data.end()};
  }
  void wait(const std::vector<std::string>& keys) override {
    for (const auto& key : keys) store_.get(prefix_ + key, left(deadline_).count());
  }
  void wait(const std::vector<std::string>& keys, const Milliseconds&) override { wait(keys); }

 private:
  viaduct::Store& store_;
  const std::string prefix_;
  const Clock::time_point deadline_;
};

class Mesh;

class GlooLink final : public Link {
 public:
  GlooLink(std::shared_ptr<Mesh> mesh, std::vector<int> worldRanks, int rank, uint64_t id)
      : mesh_(std::move(mesh)), worldRanks_(std::move(worldRanks)), rank_(rank), id_(id) {}
  const char* kind() const override { return "gloo"; }
  size_t chunkBytes() const override { return size_t{1} << 20; }
  void exchange(const std::vector<Transfer>& transfers, Clock::time_point deadline) override;
  void abort(const std::string& reason) override;

 private:
  using Buffer = gloo::transport::UnboundBuffer;
  struct Open {
    const Transfer* transfer;
    std::unique_ptr<Buffer> buffer;
  };
  void post(Open& open, uint64_t place);
  [[noreturn]] void fail(const std::vector<Open>& open, size_t at, Clock::time_point deadline, const std::string& what);

  const std::shared_ptr<Mesh> mesh_;
  const std::vector<int> worldRanks_;
  const int rank_;
  const uint64_t id_;
  std::mutex mutex_;
  bool aborted_ = false;
  std::string reason_;
  std::set<Buffer*> waiting_;
};

class Mesh final : public GlooMesh, public std::enable_shared_from_this<Mesh> {
 public:
  explicit Mesh(std::shared_ptr<gloo::rendezvous::Context> context) : context(std::move(context)) {}
  ~Mesh() override { close(); }
  std::unique_ptr<Link> link(std::vector<int> worldRanks, int rank, uint64_t id) override {
    return std::make_unique<GlooLink>(shared_from_this(), std::move(worldRanks), rank, id);
  }
  void close() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) return;
    closed_ = true;
    try {
      context->closeConnections();
    } catch (const std::exception&) {
      // They are as good as closed.
    }
  }
  const std::shared_ptr<gloo::rendezvous::Context> context;

 private:
  std::mutex mutex_;
  bool closed_ = false;
};

void GlooLink::post(Open& open, uint64_t place) {
  const Transfer& t = *open.transfer;
  const uint64_t direction = t.send ? mix(static_cast<uint64_t>(rank_), static_cast<uint64_t>(t.peer))
                                    : mix(static_cast<uint64_t>(t.peer), static_cast<uint64_t>(rank_));
  uint64_t slot = mix(mix(id_, direction), mix(static_cast<uint64_t>(t.tag.op), t.tag.sequence));
  slot = mix(mix(slot, t.tag.step), mix(t.tag.bytes, t.bytes)) ^ (place << 1);
  const int peer = worldRanks_[static_cast<size_t>(t.peer)];
  if (t.send) {
    open.buffer->send(peer, slot, 0, t.bytes);
  } else {
    open.buffer->recv(peer, slot, 0, t.bytes);
  }
}

void GlooLink::fail(const std::vector<Open>& open, size_t at, Clock::time_point deadline, const std::string& what) {
  LinkFailure failure{LinkFailure::Kind::PeerLost, {open[at].transfer->peer}, what};
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (aborted_) failure = {LinkFailure::Kind::Aborted, {}, reason_};
  }
  if (failure.kind == LinkFailure::Kind::PeerLost && Clock::now() >= deadline) {
    failure = {LinkFailure::Kind::Timeout, {}, ""};
    for (int pass = 0; pass < 2 && failure.peers.empty(); ++pass) {  // who sent nothing, else who took nothing
      for (size_t i = at; i < open.size(); ++i) {
        const Transfer& t = *open[i].transfer;
        if (t.send != (pass == 1)) continue;
        bool done = false;
        try {
          if (i != at)
            done = t.send ? open[i].buffer->waitSend(Milliseconds(1)) : open[i].buffer->waitRecv(Milliseconds(1));
        } catch (const std::exception&) {
          done = false;
        }
        auto& peers = failure.peers;
        if (!done && std::find(peers.begin(), peers.end(), t.peer) == peers.end()) peers.push_back(t.peer);
      }
    }
  }
  mesh_->close();  // nothing is to be written into these buffers any more
  throw failure;
}

void GlooLink::exchange(const std::vector<Transfer>& transfers, Clock::time_point deadline) {
  std::vector<Open> open;
  open.reserve(transfers.size());
  std::set<Buffer*> mine;
  for (const Transfer& t : transfers) {
    open.push_back({&t, mesh_->context->createUnboundBuffer(t.data, t.bytes)});
    mine.insert(open.back().buffer.get());
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (aborted_) throw LinkFailure{LinkFailure::Kind::Aborted, {}, reason_};
    waiting_ = mine;
  }
  struct Unlist {
    GlooLink* link;
    ~Unlist() {
      std::lock_guard<std::mutex> lock(link->mutex_);
      link->waiting_.clear();
    }
  } unlist{this};
  size_t at = 0;
  try {
    // Receives first: a send whose receive is known goes at once.
    for (const bool send : {false, true}) {
      for (size_t i = 0; i < open.size(); ++i) {
        if (open[i].transfer->send != send) continue;
        uint64_t place = 0;  // among the transfers of this direction with this peer
        for (size_t j = 0; j < i; ++j) place += transfers[j].peer == transfers[i].peer && transfers[j].send == send;
        at = i;
        post(open[i], place);
      }
    }
    for (const bool send : {false, true}) {
      for (size_t i = 0; i < open.size(); ++i) {
        if (open[i].transfer->send != send) continue;
        at = i;
        const bool done = send ? open[i].buffer->waitSend(left(deadline)) : open[i].buffer->waitRecv(left(deadline));
        if (!done) fail(open, at, deadline, "the wait was broken off");
      }
    }
  } catch (const std::exception& e) {
    fail(open, at, deadline, e.what());
  }
}

void GlooLink::abort(const std::string& reason) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!aborted_) reason_ = reason;
    aborted_ = true;
    for (Buffer* buffer : waiting_) {
      buffer->abortWaitRecv();
      buffer->abortWaitSend();
    }
  }
  mesh_->close();
}

std::string ranksText(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) text += (i ? ", " : "") + std::to_string(ranks[i]);
  return text;
}

/// Waits until every rank has said that it is here.
void meet(viaduct::Store& store, const std::string& prefix, int rank, int size, Clock::time_point deadline,
          int64_t timeoutMs) {
  store.set(prefix + "here/" + std::to_string(rank), {1});
  for (int r = 0; r < size; ++r) {
    try {
      store.get(prefix + "here/" + std::to_string(r), left(deadline).count());
    } catch (const Error& e) {
      if (e.code != "ERR_TIMEOUT") throw;
      std::vector<int> missing;
      for (int q = r; q < size; ++q) {
        if (!store.check(prefix + "here/" + std::to_string(q))) missing.push_back(q);
      }
      throw Error("ERR_TIMEOUT", "connect",
                  "expected " + std::to_string(size) + " ranks within " +
                      std::to_string(timeoutMs / 1000.0).substr(0, 6) + " s, not heard from " + ranksText(missing) +
                      ": see their output, or start them");
    }
  }
}

}  // namespace

std::shared_ptr<GlooMesh> GlooMesh::connect(Store& store, const std::string& name, int rank, int size,
                                            const std::string& address, int64_t timeoutMs) {
  const std::string prefix = "gloo/" + name + "/";
  const auto deadline = Clock::now() + Milliseconds(timeoutMs);
  try {
    meet(store, prefix, rank, size, deadline, timeoutMs);
    gloo::transport::tcp::attr attr;
    attr.hostname = address;
    auto device = gloo::transport::tcp::CreateDevice(attr);
    auto context = std::make_shared<gloo::rendezvous::Context>(rank, size);
    context->setTimeout(left(deadline));
    GlooStore glooStore(store, prefix, deadline);
    context->connectFullMesh(glooStore, device);
    return std::make_shared<Mesh>(std::move(context));
  } catch (const Error&) {
    throw;
  } catch (const std::exception& e) {
    throw Error("ERR_COMM", "connect",
                "expected connections between " + std::to_string(size) + " ranks from " + address + ", got " +
                    e.what() + ": see whether the other ranks live and reach this address");
  }
}

}  // namespace viaduct::cpu

#else

namespace viaduct::cpu {

std::shared_ptr<GlooMesh> GlooMesh::connect(Store&, const std::string&, int, int, const std::string&, int64_t) {
  throw Error("ERR_UNSUPPORTED", "connect",
              "expected an addon with Gloo for more than one rank, got one without: run npm run setup, which brings it "
              "(Debian's libgloo-dev), and builds the addon again");
}

}  // namespace viaduct::cpu

#endif
