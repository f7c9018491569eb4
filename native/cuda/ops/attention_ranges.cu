// Kernels around cuDNN's attention where samples or queries have ranges of keys; see ../attention_ranges.h.
#include "../attention_ranges.h"

#include <limits>

#include "../numbers.cuh"

namespace viaduct::cuda {

namespace {

constexpr int kThreads = 128;
// exp(score - this) is 0 in any arithmetic, and so is its product with log2(e).
constexpr float kFar = 1e30f;
constexpr float kSawNothing = -std::numeric_limits<float>::infinity();

__device__ __forceinline__ int keysOf(const AttentionArgs& a, int64_t b) {
  const int64_t end = a.keyEnd == nullptr ? a.K : a.keyEnd[b * a.keyEndBatch];
  return static_cast<int>(end < 0 ? 0 : (end > a.K ? a.K : end));
}

__device__ __forceinline__ bool seesNothing(const AttentionArgs& a, int64_t b, int64_t i) {
  const Visible see = a.visible(b, i);
  return see.lo >= see.hi;
}

__global__ void __launch_bounds__(kThreads)
    lengthsKernel(AttentionArgs a, int64_t perSample, int32_t* queries, int32_t* keys) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= a.B * perSample) return;
  queries[n] = static_cast<int32_t>(a.S);
  keys[n] = max(1, keysOf(a, n / perSample));
}

__global__ void __launch_bounds__(kThreads) firstKeysKernel(AttentionArgs a, int64_t row, int32_t* packed) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= a.B * a.S) return;
  const int64_t b = n / a.S, i = n % a.S;
  packed[b * row + i] = min(a.firstKey[b * a.firstKeyBatch + i * a.firstKeyQuery], static_cast<int32_t>(a.K));
}

__global__ void __launch_bounds__(kThreads) statsKernel(AttentionArgs a, float* packed) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t heads = a.G * a.R;
  if (n >= a.B * heads * a.S) return;
  const int64_t i = n % a.S, head = n / a.S % heads, b = n / a.S / heads;
  packed[n] = seesNothing(a, b, i) ? kFar : a.lse[b * a.lseBatch + head * a.lseHead + i * a.lseQuery];
}

/// Zeros in the heads of one position.
template <typename T>
__device__ __forceinline__ void clearHeads(const AttentionArgs& a, const HeadsView& x, int64_t b, int64_t position,
                                           int64_t heads, int64_t channels) {
  for (int64_t n = threadIdx.x; n < a.G * heads * channels; n += kThreads) {
    const int64_t head = n / channels;
    x.row<T>(b, position, head / heads, head % heads)[n % channels] = narrow<T>(0.0f);
  }
}

/// A block for each query.
template <typename T>
__global__ void __launch_bounds__(kThreads) clearUnseeingKernel(AttentionArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) % a.S, b = static_cast<int64_t>(blockIdx.x) / a.S;
  if (!seesNothing(a, b, i)) return;
  clearHeads<T>(a, a.out, b, i, a.R, a.Dv);
  for (int64_t head = threadIdx.x; head < a.G * a.R; head += kThreads) {
    *a.lseAt(b, head / a.R, head % a.R, i) = kSawNothing;
  }
}

/// A block for each query, then one for each key.
template <typename T>
__global__ void __launch_bounds__(kThreads) clearGradientsKernel(AttentionArgs a) {
  const int64_t block = blockIdx.x, queries = a.B * a.S;
  if (block < queries) {
    const int64_t i = block % a.S, b = block / a.S;
    if (seesNothing(a, b, i)) clearHeads<T>(a, a.dq, b, i, a.R, a.D);
    return;
  }
  const int64_t j = (block - queries) % a.K, b = (block - queries) / a.K;
  if (j < keysOf(a, b)) return;
  clearHeads<T>(a, a.dk, b, j, 1, a.D);
  clearHeads<T>(a, a.dv, b, j, 1, a.Dv);
}

unsigned blocks(int64_t n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); }

}  // namespace

void fillLengths(const AttentionArgs& a, int64_t perSample, int32_t* queries, int32_t* keys, const Launch& on) {
  on(lengthsKernel, blocks(a.B * perSample), kThreads, a, perSample, queries, keys);
}

void copyFirstKeys(const AttentionArgs& a, int64_t row, int32_t* packed, const Launch& on) {
  on(firstKeysKernel, blocks(a.B * a.S), kThreads, a, row, packed);
}

void copyStats(const AttentionArgs& a, float* packed, const Launch& on) {
  on(statsKernel, blocks(a.B * a.G * a.R * a.S), kThreads, a, packed);
}

void clearUnseeing(const AttentionArgs& a, const Launch& on) {
  dispatchFloat(a.q.dtype, [&](auto zero) {
    on(clearUnseeingKernel<decltype(zero)>, static_cast<unsigned>(a.B * a.S), kThreads, a);
  });
}

void clearUnseenGradients(const AttentionArgs& a, const Launch& on) {
  dispatchFloat(a.q.dtype, [&](auto zero) {
    on(clearGradientsKernel<decltype(zero)>, static_cast<unsigned>(a.B * (a.S + a.K)), kThreads, a);
  });
}

}  // namespace viaduct::cuda
