// ../sort.h: a radix sort from the lowest digit up. Each pass counts digits by tile of items, adds the counts up over all tiles
// digit by digit, and moves each item behind those that come before it.
#include "../sort.h"

namespace viaduct::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kWarpItems = 256;  // of one warp, in order
constexpr int64_t kTile = kWarpItems * kWarps;
constexpr int kScanThreads = 1024;
static_assert(kThreads == kDigits, "a thread of a block for each digit");

/// Which bits of the keys a pass sorts by.
struct Digit {
  int shift;
  int bits;
  __device__ uint32_t of(uint32_t key) const { return key >> shift & ((1u << bits) - 1); }
};

/// counts[d, tile]: items of the tile with digit d.
__global__ void __launch_bounds__(kThreads)
    countDigitsKernel(uint32_t* counts, const Keyed* items, int64_t n, int64_t tiles, Digit digit) {
  __shared__ uint32_t count[kDigits];
  count[threadIdx.x] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * kTile, end = min(begin + kTile, n);
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) atomicAdd(&count[digit.of(items[i].key)], 1u);
  __syncthreads();
  counts[threadIdx.x * tiles + blockIdx.x] = count[threadIdx.x];
}

/// counts[i] = sum of the counts before i. One block.
__global__ void __launch_bounds__(kScanThreads) scanKernel(uint32_t* counts, int64_t n) {
  __shared__ uint32_t sums[kScanThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint32_t before = 0;
  for (int64_t base = 0; base < n; base += kScanThreads) {
    const int64_t i = base + threadIdx.x;
    const uint32_t own = i < n ? counts[i] : 0;
    uint32_t upTo = own;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const uint32_t other = __shfl_up_sync(0xffffffffu, upTo, offset);
      if (lane >= offset) upTo += other;
    }
    if (lane == kWarp - 1) sums[warp] = upTo;
    __syncthreads();
    uint32_t at = before + upTo - own;
#pragma unroll
    for (int w = 0; w < kScanThreads / kWarp; ++w) {
      if (w < warp) at += sums[w];
      before += sums[w];
    }
    if (i < n) counts[i] = at;
    __syncthreads();  // before the next round writes sums
  }
}

/// Moves the items of each tile to where `starts` (counts, added up) says.
__global__ void __launch_bounds__(kThreads)
    moveKernel(Keyed* sorted, const Keyed* items, const uint32_t* starts, int64_t n, int64_t tiles, Digit digit) {
  __shared__ uint32_t next[kWarps][kDigits];  // where a warp's next item with this digit goes
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = blockIdx.x * kTile + warp * kWarpItems + lane;
  for (int w = 0; w < kWarps; ++w) next[w][threadIdx.x] = 0;
  __syncthreads();
  for (int k = 0; k < kWarpItems; k += kWarp) {
    if (first + k < n) atomicAdd(&next[warp][digit.of(items[first + k].key)], 1u);
  }
  __syncthreads();
  uint32_t start = starts[threadIdx.x * tiles + blockIdx.x];
  for (int w = 0; w < kWarps; ++w) {
    const uint32_t count = next[w][threadIdx.x];
    next[w][threadIdx.x] = start;
    start += count;
  }
  __syncthreads();
  for (int k = 0; k < kWarpItems; k += kWarp) {
    const bool present = first + k < n;
    const Keyed item = present ? items[first + k] : Keyed{0, 0};
    const uint32_t d = digit.of(item.key);
    unsigned alike = __ballot_sync(0xffffffffu, present);  // lanes with the same digit
#pragma unroll
    for (int bit = 0; bit < kDigitBits; ++bit) {
      const bool set = (d >> bit & 1) != 0;
      const unsigned those = __ballot_sync(0xffffffffu, set);
      alike &= set ? those : ~those;
    }
    const int rank = __popc(alike & ((1u << lane) - 1));
    if (present) sorted[next[warp][d] + rank] = item;
    __syncwarp();
    if (present && rank == 0) next[warp][d] += __popc(alike);
    __syncwarp();
  }
}

int64_t tilesOf(int64_t n) { return (n + kTile - 1) / kTile; }

}  // namespace

size_t sortBytes(int64_t n) {
  return static_cast<size_t>(n) * sizeof(Keyed) + static_cast<size_t>(tilesOf(n)) * kDigits * sizeof(uint32_t);
}

Keyed* stableSort(const Launch& on, Keyed* items, int64_t n, uint32_t largest, void* work) {
  const int64_t tiles = tilesOf(n);
  auto* other = static_cast<Keyed*>(work);
  auto* counts = reinterpret_cast<uint32_t*>(other + n);
  int bits = 0;
  while (bits < 32 && largest >> bits != 0) ++bits;
  const int passes = (bits + kDigitBits - 1) / kDigitBits;
  for (int pass = 0; pass < passes; ++pass) {
    const Digit digit{pass * kDigitBits, std::min(kDigitBits, bits - pass * kDigitBits)};
    on(countDigitsKernel, static_cast<unsigned>(tiles), kThreads, counts, items, n, tiles, digit);
    on(scanKernel, 1, kScanThreads, counts, tiles << digit.bits);
    on(moveKernel, static_cast<unsigned>(tiles), kThreads, other, items, counts, n, tiles, digit);
    std::swap(items, other);
  }
  return items;
}

}  // namespace viaduct::cuda
