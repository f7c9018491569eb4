// Sums over rows, column by column, of what a functor makes of each element: gradients of biases and of norms' weights. Cut by
// shape alone and added up in order, so that equal inputs give equal bits on any GPU.
#pragma once

#include <algorithm>

#include "cuda_backend.h"
#include "launch.cuh"
#include "numbers.cuh"

namespace viaduct::cuda {

/// A block sums a run of rows in 32 packs of columns; its warps take rows in turn.
constexpr int kColumnWarps = 8;
constexpr int kAddThreads = 256;

/// Where the K sums of each column go: added to acc[k], where that is not null.
template <int K>
struct ColumnSums {
  float* acc[K];
};

inline int64_t rowsOfColumnPart(int64_t rows) { return std::max<int64_t>(128, (rows + 255) / 256); }
inline int64_t columnParts(int64_t rows) {
  const int64_t perPart = rowsOfColumnPart(rows);
  return (rows + perPart - 1) / perPart;
}
/// Scratch memory of startColumnSums, in bytes.
template <int K>
size_t columnSumBytes(int64_t rows, int64_t columns) {
  const int64_t parts = columnParts(rows);
  return parts == 1 ? 0 : static_cast<size_t>(parts * K * columns) * sizeof(float);
}

/// parts[p, k, c] = sum over the p-th run of rows; without parts there is one run, and acc[k][c] += it.
/// `values(row, column, v)` fills v[K][W] for W columns.
template <int W, int K, typename F>
__global__ void __launch_bounds__(kWarp* kColumnWarps)
    columnSumKernel(ColumnSums<K> sums, float* parts, F values, int64_t rows, int64_t columns, int64_t rowsPerPart) {
  __shared__ float shared[kColumnWarps][kWarp][K * W];
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x) * W;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * rowsPerPart;
  const int64_t end = min(begin + rowsPerPart, rows);
  float total[K][W] = {};
  if (column < columns) {
#pragma unroll 2
    for (int64_t r = begin + threadIdx.y; r < end; r += kColumnWarps) {
      float v[K][W];
      values(r, column, v);
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int i = 0; i < W; ++i) total[k][i] += v[k][i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < K * W; ++i) shared[threadIdx.y][threadIdx.x][i] = total[i / W][i % W];
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
#pragma unroll
  for (int i = 0; i < K * W; ++i) {
    float sum = shared[0][threadIdx.x][i];
#pragma unroll
    for (int w = 1; w < kColumnWarps; ++w) sum += shared[w][threadIdx.x][i];
    const int k = i / W;
    const int64_t c = column + i % W;
    if (parts != nullptr) {
      parts[(static_cast<int64_t>(blockIdx.y) * K + k) * columns + c] = sum;
    } else if (sums.acc[k] != nullptr) {
      sums.acc[k][c] += sum;
    }
  }
}

template <int K>
__global__ void __launch_bounds__(kAddThreads)
    addColumnPartsKernel(ColumnSums<K> sums, const float* parts, int64_t count, int64_t columns) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
  float* acc = sums.acc[blockIdx.y];
  if (column >= columns || acc == nullptr) return;
  const float* first = parts + blockIdx.y * columns + column;
  float total = *first;
  for (int64_t p = 1; p < count; ++p) total += first[p * K * columns];
  acc[column] += total;
}

/// From a command. `parts` has columnSumBytes; W divides the number of columns.
template <int W, int K, typename F>
void startColumnSums(const Launch& on, ColumnSums<K> sums, float* parts, F values, int64_t rows, int64_t columns) {
  const int64_t count = columnParts(rows);
  const dim3 grid(static_cast<unsigned>((columns + kWarp * W - 1) / (kWarp * W)), static_cast<unsigned>(count));
  on(columnSumKernel<W, K, F>, grid, dim3(kWarp, kColumnWarps), sums, count == 1 ? nullptr : parts, values, rows,
     columns, rowsOfColumnPart(rows));
  if (count == 1) return;
  const dim3 adders(static_cast<unsigned>((columns + kAddThreads - 1) / kAddThreads), K);
  on(addColumnPartsKernel<K>, adders, kAddThreads, sums, parts, count, columns);
}

}  // namespace viaduct::cuda
