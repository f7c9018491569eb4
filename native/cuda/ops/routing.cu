// Which experts a token goes to, and the order of the rows that go there. A warp takes a token; its scores lie in shared memory while
// the highest are taken from them one by one.
#include "../../checks/ops.h"
#include "../cuda_backend.h"
#include "../launch.cuh"
#include "../numbers.cuh"
#include "../reduce.cuh"
#include "../sort.h"

namespace viaduct::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 4;  // of a block: its warps
constexpr uint32_t kAll = 0xffffffffu;

struct Router {
  int E;
  int K;
  int groups;
  int groupTopk;
  bool sigmoid;
  bool normalize;
  float scaling;
};

struct Best {
  float key;
  int at;
};

/// Whether a goes before b: higher, or as high and earlier. Taken ones have at < 0 and lose; a NaN counts as the lowest.
__device__ __forceinline__ bool before(Best a, Best b) {
  if (a.at < 0 || b.at < 0) return b.at < 0 && a.at >= 0;
  const bool lowA = a.key != a.key, lowB = b.key != b.key;
  if (lowA != lowB) return lowB;
  return a.key > b.key || ((a.key == b.key || lowA) && a.at < b.at);
}

/// The first of the highest of keys[0, n) that is not taken, the same in each lane; -1 where all are.
__device__ int highestOf(const float* keys, const bool* taken, int n) {
  Best best{0, -1};
  for (int i = threadIdx.x; i < n; i += kWarp) {
    const Best own{keys[i], taken[i] ? -1 : i};
    if (before(own, best)) best = own;
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Best other{__shfl_xor_sync(kAll, best.key, offset), __shfl_xor_sync(kAll, best.at, offset)};
    if (before(other, best)) best = other;
  }
  return best.at;
}

/// Takes it as well.
__device__ int takeHighest(const float* keys, bool* taken, int n) {
  const int at = highestOf(keys, taken, n);
  __syncwarp();
  if (threadIdx.x == 0 && at >= 0) taken[at] = true;
  __syncwarp();
  return at;
}

__device__ __forceinline__ float warpMax(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(kAll, value, offset));
  return value;
}

/// Bytes of shared memory of a token: scores, keys, sums of groups, then what is taken, of experts and of groups.
__host__ __device__ size_t sharedOf(int E, int groups) {
  const size_t bytes = static_cast<size_t>(2 * E + groups) * sizeof(float) + static_cast<size_t>(E + groups);
  return (bytes + 15) / 16 * 16;
}

template <typename T>
__global__ void __launch_bounds__(kTokens* kWarp)
    routeKernel(Router r, float* weights, int32_t* experts, float* scores, const T* logits, const float* bias,
                int64_t stride, int64_t tokens) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.y;
  if (t >= tokens) return;  // warps do not wait for one another
  float* score = reinterpret_cast<float*>(dynamicShared<char>() + threadIdx.y * sharedOf(r.E, r.groups));
  float *keys = score + r.E, *sums = keys + r.E;
  bool *taken = reinterpret_cast<bool*>(sums + r.groups), *groupTaken = taken + r.E;
  const T* row = logits + t * stride;
  const int lane = threadIdx.x;
  float most = -INFINITY, total = 0;
  for (int e = lane; e < r.E; e += kWarp) most = fmaxf(most, widen(row[e]));
  most = warpMax(most);
  for (int e = lane; e < r.E; e += kWarp) {
    score[e] = r.sigmoid ? 1.0f / (1.0f + expf(-widen(row[e]))) : expf(widen(row[e]) - most);
    total += score[e];
  }
  total = warpSum(total);
  const float factor = r.sigmoid ? 1.0f : 1.0f / total;
  for (int e = lane; e < r.E; e += kWarp) {
    score[e] *= factor;
    scores[t * r.E + e] = score[e];
    keys[e] = score[e] + (bias != nullptr ? bias[e] : 0.0f);
    taken[e] = false;
  }
  __syncwarp();
  if (r.groups > 1) {
    const int width = r.E / r.groups;
    for (int g = 0; g < r.groups; ++g) {
      float sum = 0;
      for (int k = 0; k < r.K / r.groupTopk; ++k)
        sum += keys[g * width + takeHighest(keys + g * width, taken + g * width, width)];
      if (lane == 0) sums[g] = sum;
      if (lane == 0) groupTaken[g] = false;
    }
    __syncwarp();
    for (int e = lane; e < r.E; e += kWarp) taken[e] = true;
    __syncwarp();
    for (int k = 0; k < r.groupTopk; ++k) {
      const int g = takeHighest(sums, groupTaken, r.groups);
      for (int e = lane; e < width; e += kWarp) taken[g * width + e] = false;
    }
    __syncwarp();
  }
  float sum = 0;
  for (int k = 0; k < r.K; ++k) {
    const int e = takeHighest(keys, taken, r.E);
    sum += score[e];
    if (lane == k % kWarp) experts[t * r.K + k] = e;
  }
  const float part = r.normalize ? r.scaling / (sum + 1e-20f) : r.scaling;
  for (int k = lane; k < r.K; k += kWarp) weights[t * r.K + k] = part * score[experts[t * r.K + k]];
}

template <typename T>
__global__ void __launch_bounds__(kTokens* kWarp)
    routeBackKernel(Router r, T* dLogits, const float* dWeights, const float* dScores, const int32_t* experts,
                    const float* scores, int64_t stride, int64_t tokens) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.y;
  if (t >= tokens) return;
  float* d = dynamicShared<float>() + threadIdx.y * r.E;
  const float* score = scores + t * r.E;
  const int lane = threadIdx.x;
  for (int e = lane; e < r.E; e += kWarp) d[e] = dScores != nullptr ? dScores[t * r.E + e] : 0.0f;
  __syncwarp();
  if (dWeights != nullptr) {
    const int32_t* chosen = experts + t * r.K;
    const float* dWeight = dWeights + t * r.K;
    float total = 0, mixed = 0;
    for (int k = lane; k < r.K; k += kWarp) {
      total += score[chosen[k]];
      mixed += dWeight[k] * score[chosen[k]];
    }
    total = warpSum(total) + 1e-20f;
    mixed = warpSum(mixed);
    for (int k = lane; k < r.K; k += kWarp) {  // no expert is chosen twice
      const float own = r.normalize ? (dWeight[k] - mixed / total) / total : dWeight[k];
      d[chosen[k]] += r.scaling * own;
    }
    __syncwarp();
  }
  float inner = 0;
  if (!r.sigmoid) {
    for (int e = lane; e < r.E; e += kWarp) inner += d[e] * score[e];
    inner = warpSum(inner);
  }
  for (int e = lane; e < r.E; e += kWarp) {
    const float slope = r.sigmoid ? 1.0f - score[e] : 1.0f;
    dLogits[t * stride + e] = narrow<T>(score[e] * slope * (d[e] - inner));
  }
}

/// A block counts one expert among one run; the sum is of whole numbers, exact up to 2^24.
__global__ void __launch_bounds__(kThreads)
    countKernel(float* counts, const int32_t* experts, int64_t perRun, int64_t numExperts) {
  const int64_t run = blockIdx.x / numExperts, expert = blockIdx.x % numExperts;
  int count = 0;
  for (int64_t i = threadIdx.x; i < perRun; i += kThreads) count += experts[run * perRun + i] == expert ? 1 : 0;
  count = blockSum<kThreads>(count);
  if (threadIdx.x == 0) counts[blockIdx.x] = static_cast<float>(count);
}

/// A warp counts the choices that come before one of the same expert.
__global__ void __launch_bounds__(kThreads) capKernel(int32_t* capped, const int32_t* experts, const float* weights,
                                                      int64_t n, int numExperts, int64_t capacity) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp; i < n; i += step) {
    const int32_t expert = experts[i];
    const float weight = weights != nullptr ? weights[i] : 0.0f;
    int before = 0;
    for (int64_t j = lane; j < n; j += kWarp) {
      if (experts[j] != expert) continue;
      const float other = weights != nullptr ? weights[j] : 0.0f;
      before += other > weight || (other == weight && j < i) ? 1 : 0;
    }
    before = warpSum(before);
    if (lane == 0) capped[i] = before < capacity ? expert : numExperts;
  }
}

/// A warp counts the choices of an expert before one, which is its place among those of the expert.
__global__ void __launch_bounds__(kThreads)
    slotsKernel(int32_t* source, int32_t* place, const int32_t* experts, int64_t n, int numExperts, int64_t capacity) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp; i < n; i += step) {
    const int32_t expert = experts[i];
    int before = 0;
    for (int64_t j = lane; j < i; j += kWarp) before += experts[j] == expert ? 1 : 0;
    before = warpSum(before);
    if (lane != 0) continue;
    const bool has = expert >= 0 && expert < numExperts && before < capacity;
    const int64_t at = has ? expert * capacity + before : numExperts * capacity;
    place[i] = static_cast<int32_t>(at);
    if (has) source[at] = static_cast<int32_t>(i);
  }
}

__global__ void __launch_bounds__(kThreads) emptyKernel(int32_t* source, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) source[i] = -1;
}

__global__ void __launch_bounds__(kThreads) keysKernel(Keyed* items, const int32_t* experts, int n, int last) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= n) return;
  items[i] = {static_cast<uint32_t>(min(max(experts[i], 0), last)), static_cast<uint32_t>(i)};
}

__global__ void __launch_bounds__(kThreads) placesKernel(int32_t* source, int32_t* place, const Keyed* sorted, int n) {
  const int at = blockIdx.x * kThreads + threadIdx.x;
  if (at >= n) return;
  const uint32_t i = sorted[at].value;
  source[at] = static_cast<int32_t>(i);
  place[i] = at;
}

unsigned blocksOf(int64_t items, int each) { return static_cast<unsigned>((items + each - 1) / each); }

/// What a block may use without asking for more.
void checkExperts(const char* op, size_t sharedBytes, int64_t E) {
  VIADUCT_CHECK(sharedBytes <= size_t{48} << 10, "ERR_UNSUPPORTED", op,
                "expected a number of experts that fits shared memory on a GPU, some 1300, got " + std::to_string(E));
}

}  // namespace

void CudaBackend::routerForward(Stream& s, Out weights, Out experts, Out scores, In logits, OptIn bias, bool sigmoid,
                                bool normalize, int64_t groups, int64_t groupTopk, double scaling) {
  checkRouterForward(weights, experts, scores, logits, bias, groups, groupTopk);
  const int64_t tokens = logits.dim(0);
  const Router r{static_cast<int>(logits.dim(1)),
                 static_cast<int>(experts.dim(1)),
                 static_cast<int>(groups),
                 static_cast<int>(groupTopk),
                 sigmoid,
                 normalize,
                 static_cast<float>(scaling)};
  const size_t bytes = kTokens * sharedOf(r.E, r.groups);
  checkExperts("routerForward", bytes, r.E);
  const Launch on(s);
  s.enqueue("routerForward", [=] {
    dispatchFloat(logits.dtype, [&](auto zero) {
      using T = decltype(zero);
      on.shared(bytes)(routeKernel<T>, blocksOf(tokens, kTokens), dim3(kWarp, kTokens), r, weights.as<float>(),
                       experts.as<int32_t>(), scores.as<float>(), logits.as<const T>(),
                       bias.present() ? bias.as<const float>() : nullptr, logits.stride[0], tokens);
    });
  });
}

void CudaBackend::routerBackward(Stream& s, Out dLogits, OptIn dWeights, OptIn dScores, In experts, In scores,
                                 bool sigmoid, bool normalize, double scaling) {
  checkRouterBackward(dLogits, dWeights, dScores, experts, scores);
  const int64_t tokens = dLogits.dim(0);
  const Router r{static_cast<int>(scores.dim(1)), static_cast<int>(experts.dim(1)), 1, 1, sigmoid, normalize,
                 static_cast<float>(scaling)};
  const size_t bytes = kTokens * static_cast<size_t>(r.E) * sizeof(float);
  checkExperts("routerBackward", bytes, r.E);
  const Launch on(s);
  s.enqueue("routerBackward", [=] {
    dispatchFloat(dLogits.dtype, [&](auto zero) {
      using T = decltype(zero);
      on.shared(bytes)(routeBackKernel<T>, blocksOf(tokens, kTokens), dim3(kWarp, kTokens), r, dLogits.as<T>(),
                       dWeights.present() ? dWeights.as<const float>() : nullptr,
                       dScores.present() ? dScores.as<const float>() : nullptr, experts.as<const int32_t>(),
                       scores.as<const float>(), dLogits.stride[0], tokens);
    });
  });
}

void CudaBackend::capExperts(Stream& s, Out capped, In experts, OptIn weights, int64_t numExperts, int64_t capacity) {
  checkCapExperts(capped, experts, weights, capacity);
  const Launch on(s);
  s.enqueue("capExperts", [=] {
    const int64_t n = experts.numel();
    on(capKernel, on.blocksFor(n, kThreads / kWarp), kThreads, capped.as<int32_t>(), experts.as<const int32_t>(),
       weights.present() ? weights.as<const float>() : nullptr, n, static_cast<int>(numExperts), capacity);
  });
}

void CudaBackend::expertCounts(Stream& s, Out counts, In experts) {
  checkExpertCounts(counts, experts);
  const Launch on(s);
  s.enqueue("expertCounts", [=] {
    on(countKernel, static_cast<unsigned>(counts.numel()), kThreads, counts.as<float>(), experts.as<const int32_t>(),
       experts.numel() / counts.dim(0), counts.dim(1));
  });
}

void CudaBackend::expertOrder(Stream& s, Out source, Out place, In experts, int64_t numExperts) {
  checkExpertOrder(source, place, experts, numExperts);
  const int64_t n = experts.numel();
  if (n == 0) return;
  const Scratch items(*this, s, static_cast<size_t>(n) * sizeof(Keyed));
  const Scratch work(*this, s, sortBytes(n));
  const Launch on(s);
  s.enqueue("expertOrder", [=, items = items.as<Keyed>(), work = work.as<void>()] {
    const int last = static_cast<int>(numExperts) - 1, count = static_cast<int>(n);
    on(keysKernel, blocksOf(n, kThreads), kThreads, items, experts.as<const int32_t>(), count, last);
    const Keyed* sorted = stableSort(on, items, n, static_cast<uint32_t>(last), work);
    on(placesKernel, blocksOf(n, kThreads), kThreads, source.as<int32_t>(), place.as<int32_t>(), sorted, count);
  });
}

void CudaBackend::expertSlots(Stream& s, Out source, Out place, In experts, int64_t numExperts, int64_t capacity) {
  checkExpertSlots(source, place, experts, numExperts, capacity);
  const Launch on(s);
  s.enqueue("expertSlots", [=] {
    const int64_t n = experts.numel(), slots = source.numel();
    if (slots > 0) on(emptyKernel, on.blocksFor(slots, kThreads), kThreads, source.as<int32_t>(), slots);
    if (n == 0) return;
    on(slotsKernel, on.blocksFor(n, kThreads / kWarp), kThreads, source.as<int32_t>(), place.as<int32_t>(),
       experts.as<const int32_t>(), n, static_cast<int>(numExperts), capacity);
  });
}

namespace {
const Support support{{"routerForward", Takes::Float},  {"routerBackward", Takes::Float},
                      {"expertCounts", Takes::AnyType}, {"capExperts", Takes::AnyType},
                      {"expertOrder", Takes::AnyType},  {"expertSlots", Takes::AnyType}};
}

}  // namespace viaduct::cuda
