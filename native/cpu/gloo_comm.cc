// Program order: an operation takes a ticket when it is called; tickets run in order, whatever thread or stream runs them.
// The first failure ends the group: it is kept, peers are told, later operations throw.
#include "gloo_comm.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <optional>
#include <random>

#include "../checks/collectives.h"
#include "../errors.h"
#include "collectives.h"
#include "gloo_link.h"
#include "reduce.h"
#include "shm_link.h"

namespace viaduct::cpu {
namespace {

/// The link of a group of one: there is nobody to speak to.
class NoLink final : public Link {
 public:
  const char* kind() const override { return "none"; }
  size_t chunkBytes() const override { return size_t{1} << 20; }
  void exchange(const std::vector<Transfer>&, Clock::time_point) override {}
  void abort(const std::string&) override {}
};

struct Ticket {
  uint64_t turn;
  Tag tag;
};

/// What a communicator shares with its commands, which may outlive it.
struct State {
  std::string name;
  int rank = 0;
  int size = 1;
  std::vector<int> worldRanks;
  uint64_t id = 0;
  bool sharedMemory = true;
  std::shared_ptr<GlooMesh> mesh;
  std::unique_ptr<Link> link;
  std::atomic<int64_t> timeoutMs{600000};
  std::vector<char> scratch;  // of the operation whose turn it is

  std::mutex mutex;
  std::condition_variable turnCame;
  uint64_t turn = 0;  // the ticket that may run
  std::optional<Error> failure;
  CommOrder order;                       // as called
  std::vector<uint64_t> sent, received;  // point-to-point transfers by peer

  std::string ranks(const std::vector<int>& peers) const {
    std::string text = peers.size() == 1 ? "rank " : "ranks ";
    for (size_t i = 0; i < peers.size(); ++i) {
      text += (i ? ", " : "") + std::to_string(worldRanks[static_cast<size_t>(peers[i])]);
    }
    return text;
  }
  std::string place(const Tag& tag) const { return "operation " + std::to_string(tag.sequence) + " of group " + name; }

  /// The failure as the caller sees it.
  Error describeFailure(const Tag& tag, const LinkFailure& f) const {
    const char* op = commOpName(tag.op);
    const auto seconds = std::to_string(static_cast<double>(timeoutMs.load()) / 1000.0);
    switch (f.kind) {
      case LinkFailure::Kind::Timeout:
        return Error("ERR_TIMEOUT", op,
                     "expected all ranks in " + place(tag) + " within " + seconds.substr(0, seconds.find('.') + 2) +
                         " s, not heard from " + ranks(f.peers) +
                         ": it is stopped, slower than the timeout, or at another operation");
      case LinkFailure::Kind::PeerLost:
        return Error("ERR_COMM", op,
                     place(tag) + " lost " + ranks(f.peers) + ": see that rank's output (" + f.detail + ")");
      case LinkFailure::Kind::PeerGaveUp:
        return Error("ERR_COMM", op, place(tag) + " ended because " + ranks(f.peers) + " gave up: " + f.detail);
      case LinkFailure::Kind::Mismatch:
        return Error("ERR_COMM", op,
                     "expected " + ranks(f.peers) + " at " + place(tag) + " with " + std::to_string(tag.bytes) +
                         " bytes, got " + f.detail + ": all ranks must call the same collectives in the same order");
      case LinkFailure::Kind::Aborted:
        break;
    }
    return Error("ERR_COMM", op, "group " + name + " was aborted: " + f.detail);
  }

  Ticket issue(CommOp op, uint64_t bytes, int64_t payloadBytes) {
    std::lock_guard<std::mutex> lock(mutex);
    throwIfFailed(commOpName(op));
    const CommTicket place = order.issue(op, bytes, payloadBytes);
    Tag tag;
    tag.op = op;
    tag.bytes = bytes;
    tag.sequence = place.sequence;
    return {place.turn, tag};
  }

  void throwIfFailed(const char* op) const {
    if (failure) throw Error("ERR_COMM", op, "group " + name + " ended earlier: " + failure->what());
  }

  /// Keeps the first failure and tells the peers.
  Error end(Error error) {
    bool first;
    {
      std::lock_guard<std::mutex> lock(mutex);
      first = !failure;
      if (first) failure = error;
    }
    if (first) link->abort(error.what());
    turnCame.notify_all();
    return error;
  }

  /// Runs `body(Collective)` when its turn has come.
  template <typename F>
  auto run(const Ticket& ticket, F&& body) -> decltype(body(std::declval<Collective>())) {
    {
      std::unique_lock<std::mutex> lock(mutex);
      turnCame.wait(lock, [&] { return turn == ticket.turn || failure; });
      throwIfFailed(commOpName(ticket.tag.op));
    }
    struct Pass {
      State* state;
      ~Pass() {
        {
          std::lock_guard<std::mutex> lock(state->mutex);
          state->turn += 1;
        }
        state->turnCame.notify_all();
      }
    } pass{this};
    const auto deadline = Clock::now() + std::chrono::milliseconds(timeoutMs.load());
    try {
      return body(Collective{*link, rank, size, ticket.tag, deadline, scratch});
    } catch (const LinkFailure& failed) {
      throw end(describeFailure(ticket.tag, failed));
    } catch (const Error& failed) {
      throw end(failed);
    }
  }
};

/// Makes the group's link. Where all ranks reach the memory that the first one offers, it is that; else Gloo's.
void makeLink(State& s) {
  if (s.size == 1) {
    s.link = std::make_unique<NoLink>();
    return;
  }
  s.link = s.mesh->link(s.worldRanks, s.rank, s.id);
  Collective c{*s.link, s.rank, s.size, Tag{}, Clock::now() + std::chrono::milliseconds(s.timeoutMs.load()), s.scratch};
  c.tag.op = CommOp::Split;
  try {
    std::unique_ptr<ShmFile> file;
    std::vector<uint8_t> offer{s.sharedMemory};
    if (s.rank == 0 && s.sharedMemory) {
      std::random_device random;
      file = ShmFile::create(s.size, (static_cast<uint64_t>(random()) << 32) | random());
      const std::string address = file ? file->address() : "";
      offer.insert(offer.end(), address.begin(), address.end());
    }
    const auto offers = runGatherBytes(c, offer);
    const bool wanted =
        std::all_of(offers.begin(), offers.end(), [](const auto& o) { return !o.empty() && o[0] == 1; });
    if (!wanted || offers[0].size() < 2) return;
    std::unique_ptr<Link> shared = attachShm(std::string(offers[0].begin() + 1, offers[0].end()), s.rank, s.size);
    c.tag.sequence = 1;
    const auto attached = runGatherBytes(c, {static_cast<uint8_t>(shared ? 1 : 0)});
    if (std::all_of(attached.begin(), attached.end(), [](const auto& a) { return a.size() == 1 && a[0] == 1; })) {
      s.link = std::move(shared);
    }
  } catch (const LinkFailure& failed) {
    throw s.describeFailure(c.tag, failed);
  }
}

class CpuCommunicator final : public Communicator {
 public:
  explicit CpuCommunicator(std::shared_ptr<State> state) : s_(std::move(state)) {}

  const std::string& name() const override { return s_->name; }
  int rank() const override { return s_->rank; }
  int size() const override { return s_->size; }
  const std::vector<int>& worldRanks() const override { return s_->worldRanks; }
  const char* transport() const override { return s_->link->kind(); }

  void allReduce(Stream& s, Out out, In in, ReduceOp op) override {
    checkCollective("allReduce", out, in, 1, 1);
    checkReducible("allReduce", in);
    enqueue(s, CommOp::AllReduce, in,
            [=](Collective c) { runAllReduce(c, out.data, in.data, in.numel(), in.dtype, op); });
  }

  void allGather(Stream& s, Out out, In in) override {
    checkCollective("allGather", out, in, s_->size, 1);
    enqueue(s, CommOp::AllGather, in, [=](Collective c) { runAllGather(c, out.data, in.data, commBytes(in)); });
  }

  void reduceScatter(Stream& s, Out out, In in, ReduceOp op) override {
    checkCollective("reduceScatter", out, in, 1, s_->size);
    checkReducible("reduceScatter", in);
    enqueue(s, CommOp::ReduceScatter, in,
            [=](Collective c) { runReduceScatter(c, out.data, in.data, out.numel(), in.dtype, op); });
  }

  void broadcast(Stream& s, InOut buffer, int root) override {
    checkBroadcast(buffer, root, s_->size);
    enqueue(s, CommOp::Broadcast, buffer, [=](Collective c) { runBroadcast(c, buffer.data, commBytes(buffer), root); });
  }

  void allToAll(Stream& s, Out out, In in, std::vector<int64_t> sendCounts, std::vector<int64_t> recvCounts) override {
    auto bytes = checkAllToAll(out, in, sendCounts, recvCounts, s_->rank, s_->size);
    enqueueTicket(
        s, s_->issue(CommOp::AllToAll, 0, static_cast<int64_t>(commBytes(in))),
        [=, bytes = std::move(bytes)](Collective c) { runAllToAll(c, out.data, in.data, bytes.send, bytes.recv); });
  }

  void pointToPoint(Stream& s, std::vector<P2p> group) override;

  void barrier(Stream& s) override {
    enqueueTicket(s, s_->issue(CommOp::Barrier, 0, 0), [](Collective c) { runBarrier(c); });
  }

  std::function<std::unique_ptr<Communicator>()> split(int colour, int key, const std::string& name) override;

  std::function<std::vector<std::vector<uint8_t>>()> gatherBytes(std::vector<uint8_t> mine) override {
    const Ticket ticket = s_->issue(CommOp::GatherBytes, 0, static_cast<int64_t>(mine.size()));
    return [state = s_, ticket, mine = std::move(mine)] {
      return state->run(ticket, [&](Collective c) { return runGatherBytes(c, mine); });
    };
  }

  void abort(const std::string& reason) override {
    s_->end(Error("ERR_COMM", "abort", "group " + s_->name + " was aborted: " + reason));
  }
  void setTimeout(int64_t timeoutMs) override { s_->timeoutMs.store(std::max<int64_t>(1, timeoutMs)); }
  uint64_t fingerprint() const override {
    std::lock_guard<std::mutex> lock(s_->mutex);
    return s_->order.fingerprint();
  }
  int64_t sequence() const override {
    std::lock_guard<std::mutex> lock(s_->mutex);
    return s_->order.sequence();
  }
  std::vector<std::pair<std::string, int64_t>> payload() const override {
    std::lock_guard<std::mutex> lock(s_->mutex);
    return s_->order.payload();
  }

 private:
  static void checkReducible(const char* op, const TensorRef& in) {
    if (!reducible(in.dtype)) refuseReduction(op, in);
  }

  template <typename F>
  void enqueue(Stream& s, CommOp op, const TensorRef& in, F body) {
    const size_t bytes = commBytes(in);
    enqueueTicket(s, s_->issue(op, bytes, static_cast<int64_t>(bytes)), std::move(body));
  }
  template <typename F>
  void enqueueTicket(Stream& s, Ticket ticket, F body) {
    s.enqueue(commOpName(ticket.tag.op), [state = s_, ticket, body = std::move(body)] { state->run(ticket, body); });
  }

  const std::shared_ptr<State> s_;
};

void CpuCommunicator::pointToPoint(Stream& s, std::vector<P2p> group) {
  int64_t payload = 0;
  checkTransfers(group, s_->rank, s_->size);
  for (const P2p& p : group) {
    if (p.send) payload += static_cast<int64_t>(commBytes(p.tensor));
  }
  const Ticket ticket = s_->issue(CommOp::PointToPoint, 0, payload);
  std::vector<Transfer> transfers;
  {
    std::lock_guard<std::mutex> lock(s_->mutex);
    for (const P2p& p : group) {
      Transfer t;
      t.send = p.send;
      t.peer = p.peer;
      t.data = p.tensor.data;
      t.bytes = commBytes(p.tensor);
      t.tag = ticket.tag;
      auto& count = (p.send ? s_->sent : s_->received)[static_cast<size_t>(p.peer)];
      t.tag.sequence = count++;
      if (t.bytes > 0) transfers.push_back(t);
    }
  }
  enqueueTicket(s, ticket, [transfers = std::move(transfers)](Collective c) {
    if (!transfers.empty()) c.link.exchange(transfers, c.deadline);
  });
}

std::shared_ptr<State> makeState(std::string name, int rank, std::vector<int> worldRanks, uint64_t id) {
  auto state = std::make_shared<State>();
  state->name = std::move(name);
  state->rank = rank;
  state->size = static_cast<int>(worldRanks.size());
  state->worldRanks = std::move(worldRanks);
  state->id = id;
  state->sent.resize(static_cast<size_t>(state->size));
  state->received.resize(static_cast<size_t>(state->size));
  return state;
}

std::function<std::unique_ptr<Communicator>()> CpuCommunicator::split(int colour, int key, const std::string& name) {
  const Ticket ticket = s_->issue(CommOp::Split, 0, 0);
  return [parent = s_, ticket, colour, key, name]() -> std::unique_ptr<Communicator> {
    return parent->run(ticket, [&](Collective c) -> std::unique_ptr<Communicator> {
      struct Choice {
        int32_t colour, key;
      };
      const Choice mine{colour, key};
      std::vector<Choice> all(static_cast<size_t>(c.size));
      runAllGather(c, all.data(), &mine, sizeof mine);
      if (colour < 0) return nullptr;
      std::vector<int> members;
      for (int r = 0; r < c.size; ++r) {
        if (all[static_cast<size_t>(r)].colour == colour) members.push_back(r);
      }
      std::stable_sort(members.begin(), members.end(),
                       [&](int a, int b) { return all[static_cast<size_t>(a)].key < all[static_cast<size_t>(b)].key; });
      const auto place = std::find(members.begin(), members.end(), c.rank) - members.begin();
      std::vector<int> worldRanks;
      for (int r : members) worldRanks.push_back(parent->worldRanks[static_cast<size_t>(r)]);
      const uint64_t id = mix(mix(parent->id, ticket.tag.sequence), static_cast<uint64_t>(colour));
      auto child = makeState(name, static_cast<int>(place), std::move(worldRanks), id);
      child->mesh = parent->mesh;
      child->sharedMemory = parent->sharedMemory;
      child->timeoutMs.store(parent->timeoutMs.load());
      makeLink(*child);
      return std::make_unique<CpuCommunicator>(std::move(child));
    });
  };
}

}  // namespace

std::unique_ptr<Communicator> connectWorld(Store* store, const CommOptions& options) {
  VIADUCT_CHECK(
      options.size >= 1 && options.rank >= 0 && options.rank < options.size, "ERR_COMM", "connect",
      "expected a rank of 0 to " + std::to_string(options.size - 1) + ", got " + std::to_string(options.rank));
  std::vector<int> ranks(static_cast<size_t>(options.size));
  for (int r = 0; r < options.size; ++r) ranks[static_cast<size_t>(r)] = r;
  const std::string shown = options.name.substr(0, options.name.find('#'));
  auto state = makeState(shown, options.rank, std::move(ranks), mix(0x776f726c64, 0));
  state->timeoutMs.store(std::max<int64_t>(1, options.timeoutMs));
  state->sharedMemory = options.sharedMemory;
  if (options.size > 1) {
    VIADUCT_CHECK(store != nullptr, "ERR_COMM", "connect", "expected a store for more than one rank, got none");
    state->mesh =
        GlooMesh::connect(*store, options.name, options.rank, options.size, options.address, options.timeoutMs);
  }
  makeLink(*state);
  return std::make_unique<CpuCommunicator>(std::move(state));
}

}  // namespace viaduct::cpu
