// What attention's kernels share. Rows are (query i, head r of the group) = i * R + r, so that the heads of a group share one
// load of keys and values. Tiles lie in shared memory as floats, rows of `stride` floats; 16 threads share a row of scores:
// thread tx of them has keys tx, tx + 16, ..., and of a product the columns 4 tx to 4 tx + 3, 4 tx + 64, ...
#pragma once

#include <cmath>
#include <limits>

#include "../attention_args.h"
#include "launch.cuh"
#include "numbers.cuh"

namespace viaduct::cuda {

constexpr int kLanes = 16;                  // threads of a row
constexpr int kColumnsAtOnce = 4 * kLanes;  // columns that they cover
constexpr int kNarrow = 128, kWide = 256;   // heads of up to so many channels: two sizes of kernels
constexpr float kUnseen = -std::numeric_limits<float>::infinity();

using Four = Pack<float, 4>;

/// Columns of a tile for n channels; those behind n are 0.
VIADUCT_HOST_DEVICE constexpr int tileColumns(int64_t n) { return static_cast<int>((n + 7) / 8 * 8); }
/// Floats between rows: an odd number of 16 bytes, so that rows lie in different banks.
VIADUCT_HOST_DEVICE constexpr int tileStride(int64_t n) { return tileColumns(n) + 4; }

/// Which tensors are read and written in packs of 16 bytes.
struct AttentionPacks {
  bool q, k, v, out, dOut, dq, dk, dv;
};

inline bool inPacks(const HeadsView& x, int64_t channels) {
  const int64_t pack = x.dtype == DType::F32 ? 4 : 8;
  const auto whole = [pack](auto... n) { return ((n % pack == 0) && ...); };
  return packable(static_cast<const char*>(x.data)) && whole(channels, x.batch, x.position, x.group, x.head);
}

inline AttentionPacks packsOf(const AttentionArgs& a) {
  return {inPacks(a.q, a.D),     inPacks(a.k, a.D),  inPacks(a.v, a.Dv), inPacks(a.out, a.Dv),
          inPacks(a.dOut, a.Dv), inPacks(a.dq, a.D), inPacks(a.dk, a.D), inPacks(a.dv, a.Dv)};
}

/// tile[i, :] = factor * rowAt(i)[0..n), zeros where rowAt(i) is null. By all threads of the block.
template <int kThreads, typename T, typename RowAt>
__device__ __forceinline__ void loadTile(float* tile, int rows, int n, bool packs, float factor, RowAt rowAt) {
  const int stride = tileStride(n);
  if (packs) {
    constexpr int W = kPackOf<T>;
    const int across = tileColumns(n) / W;
    for (int p = threadIdx.x; p < rows * across; p += kThreads) {
      const int i = p / across;
      const int column = p % across * W;
      const T* row = rowAt(i);
      float x[W] = {};
      if (row != nullptr && column < n) widenAll(*reinterpret_cast<const Pack<T, W>*>(row + column), x);
#pragma unroll
      for (int k = 0; k < W; k += 4) {
        *reinterpret_cast<Four*>(tile + i * stride + column + k) =
            Four{{x[k] * factor, x[k + 1] * factor, x[k + 2] * factor, x[k + 3] * factor}};
      }
    }
    return;
  }
  const int across = tileColumns(n);
  for (int p = threadIdx.x; p < rows * across; p += kThreads) {
    const int i = p / across;
    const int column = p % across;
    const T* row = rowAt(i);
    tile[i * stride + column] = row != nullptr && column < n ? widen(row[column]) * factor : 0.0f;
  }
}

/// row[column..column + 4) = x, as far as the row's n channels go.
template <typename T>
__device__ __forceinline__ void storeFour(T* row, int column, int n, bool packs, const float (&x)[4]) {
  if (packs) {
    if (column < n) *reinterpret_cast<Pack<T, 4>*>(row + column) = narrowAll<T>(x);
    return;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (column + k < n) row[column + k] = narrow<T>(x[k]);
  }
}

/// s[i][j] = a's row i . b's row 16 j, over `columns`.
template <int kRowsEach, int kKeysEach>
__device__ __forceinline__ void multiplyRows(float (&s)[kRowsEach][kKeysEach], const float* a, const float* b,
                                             int stride, int columns) {
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) {
#pragma unroll
    for (int j = 0; j < kKeysEach; ++j) s[i][j] = 0;
  }
  for (int d = 0; d < columns; d += 4) {
    Four x[kRowsEach], y[kKeysEach];
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) x[i] = *reinterpret_cast<const Four*>(a + i * stride + d);
#pragma unroll
    for (int j = 0; j < kKeysEach; ++j) y[j] = *reinterpret_cast<const Four*>(b + j * kLanes * stride + d);
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) {
#pragma unroll
      for (int j = 0; j < kKeysEach; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) s[i][j] += x[i].at[k] * y[j].at[k];
      }
    }
  }
}

/// y[i] += sum over rows r of x of p[i, r] * x[r, this thread's columns]; `count` is a multiple of 4.
template <int kRowsEach, int kFours>
__device__ __forceinline__ void addProduct(float (&y)[kRowsEach][kFours][4], const float* p, int pStride,
                                           const float* x, int n, int count) {
  const int first = threadIdx.x % kLanes * 4;
  const int stride = tileStride(n), columns = tileColumns(n);
  for (int r = 0; r < count; r += 4) {
    Four w[kRowsEach];
#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) w[i] = *reinterpret_cast<const Four*>(p + i * pStride + r);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int c = 0; c < kFours; ++c) {
        const int column = first + c * kColumnsAtOnce;
        if (column >= columns) continue;
        const Four v = *reinterpret_cast<const Four*>(x + (r + k) * stride + column);
#pragma unroll
        for (int i = 0; i < kRowsEach; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) y[i][c][e] += w[i].at[k] * v.at[e];
        }
      }
    }
  }
}

/// y[i] += sum over rows r of p[r, i] * x[r, this thread's columns].
template <int kKeysEach, int kFours>
__device__ __forceinline__ void addTransposed(float (&y)[kKeysEach][kFours][4], const float* p, int pStride,
                                              const float* x, int n, int count) {
  const int first = threadIdx.x % kLanes * 4;
  const int stride = tileStride(n), columns = tileColumns(n);
  for (int r = 0; r < count; ++r) {
    float w[kKeysEach];
#pragma unroll
    for (int i = 0; i < kKeysEach; ++i) w[i] = p[r * pStride + i];
#pragma unroll
    for (int c = 0; c < kFours; ++c) {
      const int column = first + c * kColumnsAtOnce;
      if (column >= columns) continue;
      const Four v = *reinterpret_cast<const Four*>(x + r * stride + column);
#pragma unroll
      for (int i = 0; i < kKeysEach; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) y[i][c][e] += w[i] * v.at[e];
      }
    }
  }
}

/// Sum, or largest, over the 16 threads of a row, in each of them.
__device__ __forceinline__ float rowSum(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
__device__ __forceinline__ float rowMax(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

/// Keys [lo, hi) that a row sees.
struct Seen {
  int lo, hi;
};

/// Of row `row` of sample b; {K, 0} when there is no such row or it sees nothing.
__device__ __forceinline__ Seen seenBy(const AttentionArgs& a, int64_t b, int row) {
  const int keys = static_cast<int>(a.K);
  if (row >= static_cast<int>(a.S * a.R)) return {keys, 0};
  const Visible see = a.visible(b, row / static_cast<int>(a.R));
  if (see.lo >= see.hi) return {keys, 0};
  return {static_cast<int>(see.lo), static_cast<int>(see.hi)};
}

/// Smallest lo and largest hi over the rows of the block's threads, in all of them; {K, 0} when they see nothing.
template <int kThreads, int kRowsEach>
__device__ __forceinline__ Seen seenByBlock(const Seen (&rows)[kRowsEach]) {
  __shared__ int lows[kThreads / kWarp], highs[kThreads / kWarp];
  int lo = rows[0].lo, hi = rows[0].hi;
#pragma unroll
  for (int i = 1; i < kRowsEach; ++i) {
    lo = min(lo, rows[i].lo);
    hi = max(hi, rows[i].hi);
  }
  lo = __reduce_min_sync(0xffffffffu, lo);
  hi = __reduce_max_sync(0xffffffffu, hi);
  if (threadIdx.x % kWarp == 0) {
    lows[threadIdx.x / kWarp] = lo;
    highs[threadIdx.x / kWarp] = hi;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / kWarp; ++w) {
    lo = min(lo, lows[w]);
    hi = max(hi, highs[w]);
  }
  return {lo, hi};
}

/// Which sample, group and tile a block has: heads run first, so that blocks that weigh alike start together.
struct Place {
  int64_t b, g;
  int head, tile;
};
__device__ __forceinline__ Place placeOf(const AttentionArgs& a) {
  const int heads = static_cast<int>(a.B * a.G);
  const int head = static_cast<int>(blockIdx.x) % heads;
  const int groups = static_cast<int>(a.G);
  return {head / groups, head % groups, head, static_cast<int>(blockIdx.x) / heads};
}

/// Row `row` of a [B, S, G, R, n] tensor, or null behind the last.
template <typename T>
__device__ __forceinline__ T* rowOf(const AttentionArgs& a, const HeadsView& x, const Place& at, int row) {
  const int heads = static_cast<int>(a.R);
  if (row >= static_cast<int>(a.S) * heads) return nullptr;
  return x.row<T>(at.b, row / heads, at.g, row % heads);
}

}  // namespace viaduct::cuda
