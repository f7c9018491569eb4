// Kernels that go row by row, for ops/norm_*.cu: a warp takes a row that fits its registers, else a block does. A row's first
// elements stay in registers from one pass to the next; what is beyond them is read again.
#pragma once

#include "numbers.cuh"
#include "reduce.cuh"
#include "rows.cuh"

namespace viaduct::cuda {

constexpr int kNormThreads = 256;
constexpr int kKeptPacks = 4;  // of a thread

/// kPer threads have a row: a warp, or all of the block.
template <int kPer>
__device__ __forceinline__ int laneOfRow() {
  return threadIdx.x;
}

/// The sum over the threads of a row, in each of them.
template <int kPer, typename V>
__device__ __forceinline__ V rowSum(V value) {
  if constexpr (kPer == kWarp) {
    return warpSum(value);
  } else {
    return blockSum<kPer>(value);
  }
}

template <int W, typename T>
__device__ __forceinline__ void loadPack(const T* from, float (&v)[W]) {
  widenAll(*reinterpret_cast<const Pack<T, W>*>(from), v);
}
template <int W, typename T>
__device__ __forceinline__ void storePack(T* to, const float (&v)[W]) {
  *reinterpret_cast<Pack<T, W>*>(to) = narrowAll<T>(v);
}

/// The packs of a thread, of the kPer that have a row: N values of each element.
template <int W, int kPer, int N = 1>
struct KeptRow {
  float kept[kKeptPacks][N][W];

  /// First pass: `f(i, v)` fills v[N][W] for W elements from place i of the row.
  template <typename F>
  __device__ __forceinline__ void fill(int64_t width, F f) {
    int64_t i = static_cast<int64_t>(laneOfRow<kPer>()) * W;
#pragma unroll
    for (int p = 0; p < kKeptPacks; ++p, i += kPer * W) {
      if (i < width) f(i, kept[p]);
    }
    for (; i < width; i += kPer * W) {
      float v[N][W];
      f(i, v);
    }
  }
  /// A later pass: `f(i, v)` is given what `fill` left, beyond the registers what `load(i, v)` reads. It may write over v.
  template <typename L, typename F>
  __device__ __forceinline__ void each(int64_t width, L load, F f) {
    int64_t i = static_cast<int64_t>(laneOfRow<kPer>()) * W;
#pragma unroll
    for (int p = 0; p < kKeptPacks; ++p, i += kPer * W) {
      if (i >= width) continue;
      float v[N][W];
#pragma unroll
      for (int k = 0; k < N * W; ++k) v[k / W][k % W] = kept[p][k / W][k % W];
      f(i, v);
    }
    for (; i < width; i += kPer * W) {
      float v[N][W];
      load(i, v);
      f(i, v);
    }
  }
};

template <int W, int kPer, typename Work>
__global__ void __launch_bounds__(kNormThreads) rowsKernel(Work work, int64_t rows, int64_t width) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (kNormThreads / kPer) + threadIdx.y;
  if (t < rows) work.template row<W, kPer>(t, width);  // a block has one row, or warps that do not wait for one another
}

/// From a command: `work.row<W, kPer>(t, width)` for each row of x. `packs`: 16 bytes may be read everywhere.
template <typename T, typename Work>
void startRows(const Launch& on, const Work& work, const TensorRef& x, bool packs) {
  constexpr int kPack = kPackOf<T>;
  const int64_t width = x.dim(-1), rows = x.numel() / width;
  const auto start = [&](auto pack, auto per) {
    constexpr int W = decltype(pack)::value, kPer = decltype(per)::value, kRows = kNormThreads / kPer;
    on(rowsKernel<W, kPer, Work>, static_cast<unsigned>((rows + kRows - 1) / kRows), dim3(kPer, kRows), work, rows,
       width);
  };
  const auto startWith = [&](auto pack) {
    constexpr int64_t kWarpsRow = int64_t{kWarp} * decltype(pack)::value * kKeptPacks;
    width <= kWarpsRow ? start(pack, std::integral_constant<int, kWarp>{})
                       : start(pack, std::integral_constant<int, kNormThreads>{});
  };
  packs&& width % kPack == 0 ? startWith(std::integral_constant<int, kPack>{})
                             : startWith(std::integral_constant<int, 1>{});
}

/// Calls f with values of the storage types of x and of a weight, which is float32 or x's.
template <typename F>
void dispatchNorm(DType x, DType weight, F&& f) {
  dispatchFloat(x, [&](auto zero) { weight == DType::F32 ? f(zero, float{}) : f(zero, zero); });
}

}  // namespace viaduct::cuda
