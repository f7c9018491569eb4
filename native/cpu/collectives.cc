// All-reduce is a reduce-scatter and an all-gather whose steps overlap: step k moves chunk k of the first and chunk k - 1 of
// the second. Small ones send everything to everybody. Empty transfers are left out on both sides.
#include "collectives.h"

#include <algorithm>
#include <cstring>

#include "../errors.h"
#include "reduce.h"

namespace viaduct::cpu {

namespace {

constexpr size_t kOneShotBytes = 16384;  // below, one round of latency costs more than the larger sum
constexpr int64_t kBlockAlign = 64;      // elements: blocks begin at whole vectors

struct Steps {
  explicit Steps(Collective& c) : c(c) {}
  void send(int peer, const void* data, size_t bytes, uint32_t step) {
    add(true, peer, const_cast<void*>(data), bytes, step);
  }
  void recv(int peer, void* data, size_t bytes, uint32_t step) { add(false, peer, data, bytes, step); }
  void run() {
    if (!list.empty()) c.link.exchange(list, c.deadline);
    list.clear();
  }

 private:
  void add(bool send, int peer, void* data, size_t bytes, uint32_t step) {
    if (bytes == 0) return;
    Transfer t;
    t.send = send;
    t.peer = peer;
    t.data = data;
    t.bytes = bytes;
    t.tag = c.tag;
    t.tag.step = step;
    list.push_back(t);
  }
  Collective& c;
  std::vector<Transfer> list;
};

/// Chunk k of the block [begin, end).
struct Part {
  int64_t begin;
  int64_t count;
};
Part part(int64_t begin, int64_t end, int64_t chunk, int64_t k) {
  const int64_t from = std::min(end, begin + k * chunk);
  return {from, std::min(end, from + chunk) - from};
}

/// Room for `bytes` of each peer; sources[r] points at rank r's, or at `own` for this rank.
char* grow(Collective& c, size_t bytes) {
  const size_t need = bytes * static_cast<size_t>(c.size) + 64;
  if (c.scratch.size() < need) c.scratch.resize(need);
  const auto address = reinterpret_cast<uintptr_t>(c.scratch.data());
  return c.scratch.data() + ((64 - address % 64) % 64);
}

void copyBytes(void* to, const void* from, size_t bytes) {
  if (to != from && bytes > 0) std::memmove(to, from, bytes);
}

void reduceOneShot(Collective& c, void* out, const void* in, int64_t count, DType dtype, ReduceOp op) {
  const size_t bytes = static_cast<size_t>(count) * dtypeBytes(dtype);
  char* room = grow(c, bytes);
  std::vector<const void*> sources(static_cast<size_t>(c.size));
  Steps steps(c);
  for (int p = 0; p < c.size; ++p) {
    char* theirs = room + bytes * static_cast<size_t>(p);
    sources[static_cast<size_t>(p)] = p == c.rank ? in : theirs;
    if (p == c.rank) continue;
    steps.send(p, in, bytes, 0);
    steps.recv(p, theirs, bytes, 0);
  }
  steps.run();
  reduceSources(out, sources.data(), c.size, count, dtype, op);
}

}  // namespace

void runAllReduce(Collective c, void* out, const void* in, int64_t count, DType dtype, ReduceOp op) {
  const size_t width = dtypeBytes(dtype);
  if (c.size == 1 || count == 0) return copyBytes(out, in, static_cast<size_t>(count) * width);
  if (static_cast<size_t>(count) * width <= kOneShotBytes) return reduceOneShot(c, out, in, count, dtype, op);

  const int64_t n = c.size;
  const int64_t block = (count + n * kBlockAlign - 1) / (n * kBlockAlign) * kBlockAlign;
  const auto begin = [&](int p) { return std::min(count, p * block); };
  const auto chunk = std::max<int64_t>(kBlockAlign, static_cast<int64_t>(c.link.chunkBytes() / width));
  const int64_t chunks = (block + chunk - 1) / chunk;
  const size_t room = static_cast<size_t>(std::min(chunk, block)) * width;
  char* scratch = grow(c, room);
  const auto at = [&](void* base, int64_t element) {
    return static_cast<char*>(base) + static_cast<size_t>(element) * width;
  };
  char* from = const_cast<char*>(static_cast<const char*>(in));

  std::vector<const void*> sources(static_cast<size_t>(n));
  Steps steps(c);
  for (int64_t k = 0; k <= chunks; ++k) {
    const Part mine = part(begin(c.rank), begin(c.rank + 1), chunk, k);
    for (int p = 0; p < c.size; ++p) {
      if (p == c.rank) {
        sources[static_cast<size_t>(p)] = at(from, mine.begin);
        continue;
      }
      char* theirs = scratch + room * static_cast<size_t>(p);
      sources[static_cast<size_t>(p)] = theirs;
      if (k > 0) {
        const Part done = part(begin(c.rank), begin(c.rank + 1), chunk, k - 1);
        const Part other = part(begin(p), begin(p + 1), chunk, k - 1);
        steps.send(p, at(out, done.begin), static_cast<size_t>(done.count) * width, static_cast<uint32_t>(2 * k + 1));
        steps.recv(p, at(out, other.begin), static_cast<size_t>(other.count) * width, static_cast<uint32_t>(2 * k + 1));
      }
      if (k < chunks) {
        const Part other = part(begin(p), begin(p + 1), chunk, k);
        steps.send(p, at(from, other.begin), static_cast<size_t>(other.count) * width, static_cast<uint32_t>(2 * k));
        steps.recv(p, theirs, static_cast<size_t>(mine.count) * width, static_cast<uint32_t>(2 * k));
      }
    }
    steps.run();
    if (k < chunks && mine.count > 0) reduceSources(at(out, mine.begin), sources.data(), c.size, mine.count, dtype, op);
  }
}

void runReduceScatter(Collective c, void* out, const void* in, int64_t count, DType dtype, ReduceOp op) {
  const size_t width = dtypeBytes(dtype);
  if (c.size == 1 || count == 0) return copyBytes(out, in, static_cast<size_t>(count) * width);
  const auto chunk = std::max<int64_t>(kBlockAlign, static_cast<int64_t>(c.link.chunkBytes() / width));
  const size_t room = static_cast<size_t>(std::min(chunk, count)) * width;
  char* scratch = grow(c, room);
  const char* from = static_cast<const char*>(in);
  std::vector<const void*> sources(static_cast<size_t>(c.size));
  Steps steps(c);
  for (int64_t k = 0; k * chunk < count; ++k) {
    const Part now = part(0, count, chunk, k);
    const size_t bytes = static_cast<size_t>(now.count) * width;
    for (int p = 0; p < c.size; ++p) {
      const char* block = from + static_cast<size_t>(p * count + now.begin) * width;
      char* theirs = scratch + room * static_cast<size_t>(p);
      sources[static_cast<size_t>(p)] = p == c.rank ? block : theirs;
      if (p == c.rank) continue;
      steps.send(p, block, bytes, static_cast<uint32_t>(k));
      steps.recv(p, theirs, bytes, static_cast<uint32_t>(k));
    }
    steps.run();
    reduceSources(static_cast<char*>(out) + static_cast<size_t>(now.begin) * width, sources.data(), c.size, now.count,
                  dtype, op);
  }
}

void runAllGather(Collective c, void* out, const void* in, size_t bytes) {
  const auto block = [&](int p) { return static_cast<char*>(out) + bytes * static_cast<size_t>(p); };
  copyBytes(block(c.rank), in, bytes);
  Steps steps(c);
  for (int d = 1; d < c.size; ++d) {
    const int to = (c.rank + d) % c.size, from = (c.rank + c.size - d) % c.size;
    steps.send(to, block(c.rank), bytes, 0);
    steps.recv(from, block(from), bytes, 0);
  }
  steps.run();
}

void runBroadcast(Collective c, void* buffer, size_t bytes, int root) {
  // A binomial tree over ranks counted from the root.
  const int me = (c.rank - root + c.size) % c.size;
  const auto real = [&](int r) { return (r + root) % c.size; };
  Steps steps(c);
  int span = 1;
  while (span < c.size && (me & span) == 0) span <<= 1;
  if (me != 0) {
    steps.recv(real(me - span), buffer, bytes, 0);
    steps.run();
  }
  for (span >>= 1; span > 0; span >>= 1) {
    if (me + span < c.size) steps.send(real(me + span), buffer, bytes, 0);
  }
  steps.run();
}

void runAllToAll(Collective c, void* out, const void* in, const std::vector<size_t>& send,
                 const std::vector<size_t>& recv) {
  Steps steps(c);
  const char* from = static_cast<const char*>(in);
  char* to = static_cast<char*>(out);
  for (int p = 0; p < c.size; ++p) {
    const auto i = static_cast<size_t>(p);
    if (p == c.rank) {
      copyBytes(to, from, send[i]);
    } else {
      steps.send(p, from, send[i], 0);
      steps.recv(p, to, recv[i], 0);
    }
    from += send[i];
    to += recv[i];
  }
  steps.run();
}

void runBarrier(Collective c) {
  std::vector<char> in(static_cast<size_t>(c.size)), out(static_cast<size_t>(c.size));
  Steps steps(c);
  for (int p = 0; p < c.size; ++p) {
    if (p == c.rank) continue;
    steps.send(p, &out[static_cast<size_t>(p)], 1, 0);
    steps.recv(p, &in[static_cast<size_t>(p)], 1, 0);
  }
  steps.run();
}

std::vector<std::vector<uint8_t>> runGatherBytes(Collective c, const std::vector<uint8_t>& mine) {
  constexpr uint64_t kMost = uint64_t{64} << 20;
  VIADUCT_CHECK(mine.size() <= kMost, "ERR_COMM", "gatherBytes",
                "expected at most 64 MiB a rank, got " + std::to_string(mine.size()) + " bytes: use tensors");
  std::vector<uint64_t> sizes(static_cast<size_t>(c.size));
  const uint64_t own = mine.size();
  runAllGather(c, sizes.data(), &own, sizeof own);
  std::vector<std::vector<uint8_t>> all(static_cast<size_t>(c.size));
  Steps steps(c);
  for (int p = 0; p < c.size; ++p) {
    const auto i = static_cast<size_t>(p);
    VIADUCT_CHECK(sizes[i] <= kMost, "ERR_COMM", "gatherBytes",
                  "a peer announced " + std::to_string(sizes[i]) + " bytes");
    if (p == c.rank) {
      all[i] = mine;
      continue;
    }
    all[i].resize(sizes[i]);
    steps.send(p, mine.data(), mine.size(), 1);
    steps.recv(p, all[i].data(), all[i].size(), 1);
  }
  steps.run();
  return all;
}

}  // namespace viaduct::cpu
