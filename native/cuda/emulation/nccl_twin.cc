// NCCL's functions between emulated GPUs of several processes, for tests alone: it runs nccl_comm.cc's order, groups, splits,
// errors and aborts without a GPU. As with NCCL calls return at once, the work goes on behind the stream, counts are not
// compared, an operation whose peer has gone never ends unless it is aborted, and sums are rounded at each step. Some calls are
// in progress at first, as they may be.
#include <nccl.h>

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../half.h"
#include "block.h"
#include "nccl_links.h"
#include "pending.h"

using viaduct::emulation::LinksBroken;
using viaduct::emulation::NcclLinks;
using viaduct::emulation::Part;
using viaduct::emulation::Pending;
using viaduct::emulation::PendingList;

namespace {

/// Where a rank is in a part of a group: known once the group has exchanged its choices.
struct Membership {
  std::mutex mutex;
  std::condition_variable known;
  std::string id;
  int rank = 0;
  int size = 0;  // 0: not known yet
};

struct Job {
  PendingList::Items before;
  std::shared_ptr<Pending> own;
  std::function<void(NcclLinks&)> run;
};

}  // namespace

struct ncclComm {
  std::shared_ptr<Membership> place;
  std::atomic<bool> aborted{false};
  NcclLinks links{aborted};
  std::atomic<int> state{ncclInProgress};
  std::atomic<int> hesitations{0};
  std::atomic<unsigned> calls{0};
  int splits = 0;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Job> jobs;
  bool leaving = false;
  std::thread worker;

  void start() {
    worker = std::thread([this] { work(); });
  }

  void work() {
    try {
      std::string id;
      int rank = 0, size = 0;
      {
        std::unique_lock<std::mutex> lock(place->mutex);
        while (!place->known.wait_for(lock, std::chrono::milliseconds(5), [this] { return place->size > 0; })) {
          if (aborted) return;
        }
        id = place->id;
        rank = place->rank;
        size = place->size;
      }
      links.connect(id, rank, size);
      state = ncclSuccess;
      for (;;) {
        Job job;
        {
          std::unique_lock<std::mutex> lock(mutex);
          changed.wait(lock, [this] { return aborted || leaving || !jobs.empty(); });
          if (aborted || jobs.empty()) return;
          job = jobs.front();
        }
        for (const auto& item : job.before) {
          while (!item->waitFor(std::chrono::milliseconds(5))) {
            if (aborted) return;
          }
        }
        job.run(links);
        if (job.own != nullptr) job.own->finish();
        std::lock_guard<std::mutex> lock(mutex);
        jobs.pop_front();
      }
    } catch (const LinksBroken&) {
      state = ncclRemoteError;  // and what runs on the GPU goes on waiting
    }
  }

  void push(Job job) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      jobs.push_back(std::move(job));
    }
    changed.notify_all();
  }

  /// A job behind all that the stream has so far.
  ncclResult_t enqueue(cudaStream_t stream, std::function<void(NcclLinks&)> run) {
    Job job{stream->pending.get(), std::make_shared<Pending>(), std::move(run)};
    stream->pending.set({job.own});
    push(std::move(job));
    if (++calls % 3 != 0) return ncclSuccess;
    hesitations = 2;
    return ncclInProgress;
  }

  void leave(bool abort) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      aborted = aborted || abort;
      leaving = true;
    }
    changed.notify_all();
    if (worker.joinable()) worker.join();
    for (const Job& job : jobs) {
      if (job.own != nullptr) job.own->finish();
    }
  }
};

namespace {

/// A call between ncclGroupStart and ncclGroupEnd.
struct Grouped {
  ncclComm_t comm;
  cudaStream_t stream;
  Part part;
};
thread_local int groupDepth = 0;
thread_local std::vector<Grouped> grouped;

size_t bytesOf(ncclDataType_t type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8:
      return 1;
    case ncclFloat16:
    case ncclBfloat16:
      return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32:
      return 4;
    default:
      return 8;
  }
}

bool usable(const void* data, size_t bytes) {
  viaduct::emulation::lockEmulation();
  const bool yes = bytes == 0 || viaduct::emulation::shadow().usable(data, bytes);
  viaduct::emulation::unlockEmulation();
  return yes;
}

template <typename T>
T combine(T a, T b, ncclRedOp_t op) {
  if constexpr (std::is_same_v<T, viaduct::BF16> || std::is_same_v<T, viaduct::F16>) {
    return viaduct::fromFloat<T>(combine(viaduct::toFloat(a), viaduct::toFloat(b), op));
  } else if constexpr (std::is_floating_point_v<T>) {
    return op == ncclSum ? a + b : op == ncclMax ? std::fmax(a, b) : std::fmin(a, b);
  } else {
    return static_cast<T>(op == ncclSum ? a + b : op == ncclMax ? std::max(a, b) : std::min(a, b));
  }
}

template <typename T>
void reduceInto(void* sum, const void* more, size_t count, ncclRedOp_t op) {
  T* y = static_cast<T*>(sum);
  const T* x = static_cast<const T*>(more);
  for (size_t i = 0; i < count; ++i) y[i] = combine(y[i], x[i], op);
}

void reduce(void* sum, const void* more, size_t count, ncclDataType_t type, ncclRedOp_t op) {
  switch (type) {
    case ncclInt8:
      return reduceInto<int8_t>(sum, more, count, op);
    case ncclUint8:
      return reduceInto<uint8_t>(sum, more, count, op);
    case ncclInt32:
      return reduceInto<int32_t>(sum, more, count, op);
    case ncclUint32:
      return reduceInto<uint32_t>(sum, more, count, op);
    case ncclInt64:
      return reduceInto<int64_t>(sum, more, count, op);
    case ncclUint64:
      return reduceInto<uint64_t>(sum, more, count, op);
    case ncclFloat16:
      return reduceInto<viaduct::F16>(sum, more, count, op);
    case ncclBfloat16:
      return reduceInto<viaduct::BF16>(sum, more, count, op);
    case ncclFloat32:
      return reduceInto<float>(sum, more, count, op);
    case ncclFloat64:
      return reduceInto<double>(sum, more, count, op);
  }
}

/// Every rank's block p of `bytes` goes to rank p; they are reduced in rank order into `out`.
void reduceBlocks(NcclLinks& links, const std::vector<const char*>& blocks, void* out, size_t count,
                  ncclDataType_t type, ncclRedOp_t op) {
  const size_t bytes = count * bytesOf(type);
  std::vector<std::vector<char>> from(static_cast<size_t>(links.size()), std::vector<char>(bytes));
  std::vector<Part> parts;
  for (int p = 0; p < links.size(); ++p) {
    parts.push_back({true, p, const_cast<char*>(blocks[static_cast<size_t>(p)]), bytes});
    parts.push_back({false, p, from[static_cast<size_t>(p)].data(), bytes});
  }
  links.exchange(parts);
  for (size_t p = 1; p < from.size(); ++p) reduce(from[0].data(), from[p].data(), count, type, op);
  std::memcpy(out, from[0].data(), bytes);
}

std::string hex(const char* bytes, size_t n) {
  std::string text;
  char two[3];
  for (size_t i = 0; i < n; ++i) {
    std::snprintf(two, sizeof two, "%02x", static_cast<unsigned char>(bytes[i]));
    text += two;
  }
  return text;
}

ncclResult_t transfer(bool send, const void* data, size_t bytes, int peer, ncclComm_t comm, cudaStream_t stream) {
  if (!usable(data, bytes)) return ncclInvalidArgument;
  grouped.push_back({comm, stream, {send, peer, const_cast<void*>(data), bytes}});
  if (groupDepth > 0) return ncclSuccess;
  groupDepth = 1;
  return ncclGroupEnd();
}

}  // namespace

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::random_device random;
  std::memset(id->internal, 0, sizeof id->internal);
  for (int i = 0; i < 12; ++i) id->internal[i] = static_cast<char>(random());
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int size, ncclUniqueId id, int rank, ncclConfig_t* config) {
  if (config->blocking != 0 || size < 1 || rank < 0 || rank >= size) return ncclInvalidArgument;
  *comm = new ncclComm();
  (*comm)->place = std::make_shared<Membership>();
  (*comm)->place->id = hex(id.internal, 12);
  (*comm)->place->rank = rank;
  (*comm)->place->size = size;
  (*comm)->start();
  return ncclInProgress;
}

ncclResult_t ncclCommSplit(ncclComm_t comm, int colour, int key, ncclComm_t* part, ncclConfig_t*) {
  auto place = std::make_shared<Membership>();
  *part = nullptr;
  if (colour != NCCL_SPLIT_NOCOLOR) {
    *part = new ncclComm();
    (*part)->place = place;
    (*part)->start();
  }
  const int number = comm->splits++;
  comm->push({{}, nullptr, [comm, place, colour, key, number](NcclLinks& links) {
                struct Choice {
                  int colour, key;
                };
                std::vector<Choice> all(static_cast<size_t>(links.size()));
                Choice mine{colour, key};
                std::vector<Part> parts;
                for (int p = 0; p < links.size(); ++p) {
                  parts.push_back({true, p, &mine, sizeof mine});
                  parts.push_back({false, p, &all[static_cast<size_t>(p)], sizeof mine});
                }
                links.exchange(parts);
                const auto before = [&](int a, int b) {
                  const Choice &x = all[static_cast<size_t>(a)], &y = all[static_cast<size_t>(b)];
                  return x.key != y.key ? x.key < y.key : a < b;
                };
                int rank = 0, size = 0;
                for (int p = 0; p < links.size(); ++p) {
                  if (all[static_cast<size_t>(p)].colour != colour) continue;
                  size += 1;
                  rank += before(p, links.rank());
                }
                {
                  std::lock_guard<std::mutex> lock(place->mutex);
                  place->id = comm->place->id + "." + std::to_string(number) + "." + std::to_string(colour);
                  place->rank = rank;
                  place->size = size;
                }
                place->known.notify_all();
              }});
  return ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* result) {
  if (comm->hesitations > 0) {
    comm->hesitations -= 1;
    *result = ncclInProgress;
  } else {
    *result = static_cast<ncclResult_t>(comm->state.load());
  }
  return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
  if (comm->state != ncclSuccess) return ncclInvalidUsage;
  comm->state = ncclInProgress;
  comm->push({{}, nullptr, [comm](NcclLinks&) { comm->state = ncclSuccess; }});
  return ncclInProgress;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  comm->leave(false);
  delete comm;
  return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
  comm->leave(true);
  delete comm;
  return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t result) {
  return result == ncclRemoteError ? "remote process exited or there was a network error" : "emulated NCCL error";
}

const char* ncclGetLastError(ncclComm_t) { return ""; }

ncclResult_t ncclGroupStart() {
  groupDepth += 1;
  return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
  if (--groupDepth > 0 || grouped.empty()) return ncclSuccess;
  const std::vector<Grouped> calls = std::move(grouped);
  grouped.clear();
  std::vector<Part> parts;
  for (const Grouped& call : calls) {
    if (call.comm != calls[0].comm || call.stream != calls[0].stream) return ncclInvalidUsage;
    parts.push_back(call.part);
  }
  return calls[0].comm->enqueue(calls[0].stream, [parts](NcclLinks& links) { links.exchange(parts); });
}

ncclResult_t ncclAllReduce(const void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
  const size_t bytes = count * bytesOf(type);
  if (!usable(in, bytes) || !usable(out, bytes)) return ncclInvalidArgument;
  return comm->enqueue(stream, [=](NcclLinks& links) {
    const std::vector<const char*> blocks(static_cast<size_t>(links.size()), static_cast<const char*>(in));
    reduceBlocks(links, blocks, out, count, type, op);
  });
}

ncclResult_t ncclReduceScatter(const void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream) {
  const size_t bytes = count * bytesOf(type);
  if (!usable(out, bytes)) return ncclInvalidArgument;
  return comm->enqueue(stream, [=](NcclLinks& links) {
    std::vector<const char*> blocks;
    for (int p = 0; p < links.size(); ++p)
      blocks.push_back(static_cast<const char*>(in) + static_cast<size_t>(p) * bytes);
    reduceBlocks(links, blocks, out, count, type, op);
  });
}

ncclResult_t ncclAllGather(const void* in, void* out, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  const size_t bytes = count * bytesOf(type);
  if (!usable(in, bytes)) return ncclInvalidArgument;
  return comm->enqueue(stream, [=](NcclLinks& links) {
    std::vector<Part> parts;
    for (int p = 0; p < links.size(); ++p) {
      parts.push_back({true, p, const_cast<void*>(in), bytes});
      parts.push_back({false, p, static_cast<char*>(out) + static_cast<size_t>(p) * bytes, bytes});
    }
    links.exchange(parts);
  });
}

ncclResult_t ncclBroadcast(const void* in, void* out, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
  const size_t bytes = count * bytesOf(type);
  if (!usable(out, bytes)) return ncclInvalidArgument;
  return comm->enqueue(stream, [=](NcclLinks& links) {
    std::vector<Part> parts;
    for (int p = 0; p < links.size() && links.rank() == root; ++p)
      parts.push_back({true, p, const_cast<void*>(in), bytes});
    parts.push_back({false, root, out, bytes});
    links.exchange(parts);
  });
}

ncclResult_t ncclSend(const void* in, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  return transfer(true, in, count * bytesOf(type), peer, comm, stream);
}

ncclResult_t ncclRecv(void* out, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  return transfer(false, out, count * bytesOf(type), peer, comm, stream);
}
