// Rows for stores and communicators: both are numbers to JavaScript. What blocks (connecting, store calls, split, host values)
// answers with a promise and runs on the pool; collectives are enqueued on a stream. A group has a communicator for the host's
// memory and, from the first use on, one for a device's. When any stream of the environment fails, its communicators are
// aborted, so that the peers fail too.
#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>

#include "../comm_order.h"
#include "../cpu/gloo_comm.h"
#include "../heartbeat.h"
#include "../plugin.h"
#include "../presence.h"
#include "../tcp_store.h"
#include "bind.h"

namespace viaduct::binding {
namespace {

using CommPtr = std::shared_ptr<Communicator>;

/// Ranks with their communicators.
struct Group {
  CommPtr host;
  std::shared_ptr<ClosableStore> store;
  std::string key;  // in the store; equal on all ranks of the group
  std::atomic<int64_t> timeoutMs{600000};
  int64_t splits = 0;  // so far: all ranks split alike
  std::mutex mutex;
  CommPtr device;  // null until it is used
  Backend* on = nullptr;

  std::vector<CommPtr> comms() {
    std::lock_guard<std::mutex> lock(mutex);
    return device == nullptr ? std::vector<CommPtr>{host} : std::vector<CommPtr>{device, host};
  }
};

using GroupPtr = std::shared_ptr<Group>;

/// Tables that failing streams read from their own threads.
struct Tables {
  std::mutex mutex;
  int64_t next = 1;
  std::map<int64_t, GroupPtr> groups;
  std::map<int64_t, std::shared_ptr<ClosableStore>> stores;
  std::map<int64_t, std::shared_ptr<TcpStoreServer>> servers;
  std::map<int64_t, std::shared_ptr<Presence>> presences;

  template <typename T>
  int64_t add(std::map<int64_t, T>& table, T object) {
    std::lock_guard<std::mutex> lock(mutex);
    table.emplace(next, std::move(object));
    return next++;
  }
  template <typename T>
  T find(std::map<int64_t, T>& table, int64_t id, const char* what) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = table.find(id);
    if (found != table.end()) return found->second;
    throw Error("ERR_HANDLE", what, std::string("expected a live ") + what + ", got number " + std::to_string(id));
  }
  template <typename T>
  T take(std::map<int64_t, T>& table, int64_t id) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = table.find(id);
    if (found == table.end()) return nullptr;
    T object = std::move(found->second);
    table.erase(found);
    return object;
  }
  void abortAll(const std::string& reason) {
    std::vector<GroupPtr> all;
    {
      std::lock_guard<std::mutex> lock(mutex);
      for (const auto& entry : groups) all.push_back(entry.second);
    }
    for (const auto& group : all) {
      for (const auto& comm : group->comms()) comm->abort(reason);
    }
  }
};

struct CommPart {
  std::shared_ptr<Tables> tables = std::make_shared<Tables>();
  bool hooked = false;

  void close() {
    tables->abortAll("its process ends");
    std::lock_guard<std::mutex> lock(tables->mutex);
    for (const auto& entry : tables->stores) entry.second->close();
  }
};

std::shared_ptr<Tables> tablesOf(Env& env) {
  CommPart& part = env.part<CommPart>();
  if (!part.hooked) {
    part.hooked = true;
    env.onStreamFailure([weak = std::weak_ptr<Tables>(part.tables)](std::exception_ptr failure) {
      const auto tables = weak.lock();
      if (!tables) return;
      try {
        std::rethrow_exception(failure);
      } catch (const std::exception& e) {
        tables->abortAll(e.what());
      } catch (...) {
        tables->abortAll("a stream failed");
      }
    });
  }
  return part.tables;
}

GroupPtr groupOf(Env& env, int64_t id) {
  const auto tables = tablesOf(env);
  return tables->find(tables->groups, id, "communicator");
}

/// The group's communicator for tensors of `device`.
CommPtr commOn(Group& group, Backend& device) {
  if (device.onHost()) return group.host;
  std::lock_guard<std::mutex> lock(group.mutex);
  if (group.device == nullptr) {
    group.device = pluginOf(device).connect(device, {group.host, group.store, group.key, group.timeoutMs.load()});
    group.on = &device;
  }
  VIADUCT_CHECK(group.on == &device, "ERR_UNSUPPORTED", "collective",
                "expected tensors of one device in group " + group.host->name() + ", got tensors of two");
  return group.device;
}

CommPtr commFor(Env& env, int64_t id, const Stream& s) { return commOn(*groupOf(env, id), env.backendOf(s)); }

std::shared_ptr<ClosableStore> storeOf(Env& env, int64_t id) {
  const auto tables = tablesOf(env);
  return tables->find(tables->stores, id, "store");
}

// ---- stores

/// { id, port }: a store's server, listening.
Value storeServer(Env& env, const std::string& host, int port, const std::string& jobId) {
  const auto tables = tablesOf(env);
  auto server = std::make_shared<TcpStoreServer>(host, port, jobId);
  const int bound = server->port();
  return Value::Record{{"id", tables->add(tables->servers, std::move(server))}, {"port", bound}};
}

void storeServerClose(Env& env, int64_t id) {
  const auto tables = tablesOf(env);
  tables->take(tables->servers, id);
}

/// The store's number. `kind` is "viaduct" or "torch".
Promise storeClient(Env& env, const std::string& kind, const std::string& host, int port, const std::string& jobId,
                    int64_t timeoutMs) {
  return async(env, [=, tables = tablesOf(env)] {
    std::shared_ptr<ClosableStore> store =
        kind == "torch" ? connectTorchStore(host, port, timeoutMs) : connectTcpStore(host, port, jobId, timeoutMs);
    return tables->add(tables->stores, std::move(store));
  });
}

Promise storeSet(Env& env, int64_t id, const std::string& key, BytesIn value) {
  return async(env, [store = storeOf(env, id), key, bytes = std::vector<uint8_t>(value.data, value.data + value.size)] {
    store->set(key, bytes);
  });
}

Promise storeGet(Env& env, int64_t id, const std::string& key, int64_t timeoutMs) {
  return async(env, [store = storeOf(env, id), key, timeoutMs] { return store->get(key, timeoutMs); });
}

Promise storeAdd(Env& env, int64_t id, const std::string& key, int64_t amount) {
  return async(env, [store = storeOf(env, id), key, amount] { return store->add(key, amount); });
}

Promise storeCheck(Env& env, int64_t id, const std::string& key) {
  return async(env, [store = storeOf(env, id), key] { return store->check(key); });
}

/// This host's address on the way to the store.
Promise storeAddress(Env& env, int64_t id) {
  return async(env, [store = storeOf(env, id)] { return store->localAddress(); });
}

/// Calls in progress reject with ERR_COMM or ERR_ABORTED.
void storeClose(Env& env, int64_t id) {
  const auto tables = tablesOf(env);
  if (const auto store = tables->take(tables->stores, id)) store->close();
}

/// The presence's number; see native/presence.h.
int64_t startPresence(Env& env, const std::string& host, int port, const std::string& jobId, const std::string& member,
                      int64_t periodMs, int64_t leastMs) {
  const auto tables = tablesOf(env);
  return tables->add(tables->presences, std::make_shared<Presence>(host, port, jobId, member, periodMs, leastMs));
}

/// { unansweredMs, silent: [{ member, ms, gone }] }
Value presence(Env& env, int64_t id) {
  const auto tables = tablesOf(env);
  const auto state = tables->find(tables->presences, id, "presence")->state();
  std::vector<Value> silent;
  for (const Silence& one : state.silent)
    silent.emplace_back(Value::Record{{"member", one.member}, {"ms", one.ms}, {"gone", one.gone}});
  return Value::Record{{"unansweredMs", state.unansweredMs}, {"silent", std::move(silent)}};
}

/// `politely`: takes its leave, so that nobody misses it.
Promise stopPresence(Env& env, int64_t id, bool politely) {
  const auto tables = tablesOf(env);
  return async(env, [gone = tables->take(tables->presences, id), politely] {
    if (gone != nullptr && politely) gone->leave();
  });
}

void heartbeat(Env& env, const std::string& file, int64_t periodMs) { startHeartbeat(file, periodMs); }

// ---- communicators

/// The world's communicator; every rank calls it. `store` is 0 for a world of one.
Promise connectGloo(Env& env, int64_t store, const std::string& name, int rank, int size, const std::string& address,
                    int64_t timeoutMs, bool sharedMemory) {
  std::shared_ptr<ClosableStore> held = store == 0 ? nullptr : storeOf(env, store);
  cpu::CommOptions options{name, rank, size, address, timeoutMs, sharedMemory};
  return async(env, [tables = tablesOf(env), held, options] {
    auto group = std::make_shared<Group>();
    group->host = cpu::connectWorld(held.get(), options);
    group->store = held;
    group->key = options.name;
    group->timeoutMs = options.timeoutMs;
    return tables->add(tables->groups, std::move(group));
  });
}

/// Begins to connect the group for tensors of a device; every rank calls it. Groups that are split from it later get their
/// communicators by a split too. Without it a group connects at its first operation on the device.
void connectDevice(Env& env, int64_t id, Backend& device) { commOn(*groupOf(env, id), device); }

/// The number of the part's communicator, 0 for a negative colour.
Promise splitComm(Env& env, int64_t id, int colour, int key, const std::string& name) {
  const GroupPtr whole = groupOf(env, id);
  std::shared_ptr<Group> part = std::make_shared<Group>();
  part->store = whole->store;
  part->key = whole->key + "/" + std::to_string(whole->splits++) + "." + std::to_string(colour);
  part->timeoutMs = whole->timeoutMs.load();
  part->on = whole->on;
  // A device's communicator splits that of the host with it.
  auto work = whole->comms().front()->split(colour, key, name);
  return async(env, [tables = tablesOf(env), part, work = std::move(work)]() -> int64_t {
    CommPtr comm = work();
    if (comm == nullptr) return 0;
    part->host = comm->host() == nullptr ? comm : comm->host();
    if (part->host != comm)
      part->device = comm;
    else
      part->on = nullptr;
    return tables->add(tables->groups, part);
  });
}

/// Everybody's bytes, in rank order.
Promise gatherBytes(Env& env, int64_t id, BytesIn mine) {
  auto work = groupOf(env, id)->host->gatherBytes(std::vector<uint8_t>(mine.data, mine.data + mine.size));
  return async(env, [work = std::move(work)] {
    std::vector<Value> list;
    for (auto& bytes : work()) list.emplace_back(std::move(bytes));
    return Value(std::move(list));
  });
}

Value commInfo(Env& env, int64_t id) {
  const auto comms = groupOf(env, id)->comms();
  uint64_t fingerprint = comms.back()->fingerprint();
  if (comms.size() > 1) fingerprint = mix(fingerprint, comms.front()->fingerprint());
  char print[17];
  std::snprintf(print, sizeof print, "%016llx", static_cast<unsigned long long>(fingerprint));
  int64_t sequence = 0, total = 0;
  std::map<std::string, int64_t> payload;
  for (const CommPtr& comm : comms) {
    sequence += comm->sequence();
    for (const auto& [op, bytes] : comm->payload()) {
      total += bytes;
      payload[op] += bytes;
    }
  }
  Value::Record byOp;
  for (const auto& [op, bytes] : payload) byOp.emplace_back(op, bytes);
  const CommPtr& comm = comms.front();
  std::vector<int64_t> ranks(comm->worldRanks().begin(), comm->worldRanks().end());
  return Value::Record{
      {"name", comm->name()},           {"rank", comm->rank()},           {"size", comm->size()},
      {"worldRanks", std::move(ranks)}, {"transport", comm->transport()}, {"fingerprint", std::string(print)},
      {"sequence", sequence},           {"payloadBytes", total},          {"payload", std::move(byOp)}};
}

void abortComm(Env& env, int64_t id, const std::string& reason) {
  for (const CommPtr& comm : groupOf(env, id)->comms()) comm->abort(reason);
}

void setCommTimeout(Env& env, int64_t id, int64_t timeoutMs) {
  const GroupPtr group = groupOf(env, id);
  group->timeoutMs = timeoutMs;
  for (const CommPtr& comm : group->comms()) comm->setTimeout(timeoutMs);
}

void closeComm(Env& env, int64_t id) {
  const auto tables = tablesOf(env);
  const GroupPtr group = tables->take(tables->groups, id);
  if (group == nullptr || group->device == nullptr) return;
  env.runBlocking([group] { group->device.reset(); });  // takes its leave of the peers
}

void allReduce(Env& env, int64_t comm, Stream& s, Out out, In in, ReduceOp op) {
  commFor(env, comm, s)->allReduce(s, out, in, op);
}

void allGather(Env& env, int64_t comm, Stream& s, Out out, In in) { commFor(env, comm, s)->allGather(s, out, in); }

void reduceScatter(Env& env, int64_t comm, Stream& s, Out out, In in, ReduceOp op) {
  commFor(env, comm, s)->reduceScatter(s, out, in, op);
}

void broadcast(Env& env, int64_t comm, Stream& s, InOut buffer, int root) {
  commFor(env, comm, s)->broadcast(s, buffer, root);
}

void allToAll(Env& env, int64_t comm, Stream& s, Out out, In in, std::vector<int64_t> sendCounts,
              std::vector<int64_t> recvCounts) {
  commFor(env, comm, s)->allToAll(s, out, in, std::move(sendCounts), std::move(recvCounts));
}

/// One atomic group: all sends and receives progress together. Peers are ranks of the group.
void pointToPoint(Env& env, int64_t comm, Stream& s, std::vector<In> sends, std::vector<int64_t> sendPeers,
                  std::vector<Out> recvs, std::vector<int64_t> recvPeers) {
  VIADUCT_CHECK(sends.size() == sendPeers.size() && recvs.size() == recvPeers.size(), "ERR_USAGE", "pointToPoint",
                "expected a peer for each tensor");
  std::vector<P2p> group;
  for (size_t i = 0; i < sends.size(); ++i) group.push_back({true, static_cast<int>(sendPeers[i]), sends[i]});
  for (size_t i = 0; i < recvs.size(); ++i) group.push_back({false, static_cast<int>(recvPeers[i]), recvs[i]});
  commFor(env, comm, s)->pointToPoint(s, std::move(group));
}

void barrier(Env& env, int64_t comm, Stream& s) { commFor(env, comm, s)->barrier(s); }

}  // namespace

std::vector<Row> commRows() {
  return {
      row("storeServer", &storeServer),     row("storeServerClose", &storeServerClose),
      row("storeClient", &storeClient),     row("storeSet", &storeSet),
      row("storeGet", &storeGet),           row("storeAdd", &storeAdd),
      row("storeCheck", &storeCheck),       row("storeAddress", &storeAddress),
      row("storeClose", &storeClose),       row("startPresence", &startPresence),
      row("presence", &presence),           row("stopPresence", &stopPresence),
      row("startHeartbeat", &heartbeat),    row("connectGloo", &connectGloo),
      row("connectDevice", &connectDevice), row("splitComm", &splitComm),
      row("gatherBytes", &gatherBytes),     row("commInfo", &commInfo),
      row("abortComm", &abortComm),         row("setCommTimeout", &setCommTimeout),
      row("closeComm", &closeComm),         row("allReduce", &allReduce),
      row("allGather", &allGather),         row("reduceScatter", &reduceScatter),
      row("broadcast", &broadcast),         row("allToAll", &allToAll),
      row("pointToPoint", &pointToPoint),   row("barrier", &barrier),
  };
}

}  // namespace viaduct::binding
