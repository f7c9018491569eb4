// Sums: sum over all elements, sumRows over rows. Cut by shape alone and added up in order, so that equal inputs give equal
// bits on any GPU.
#include "../reduce.cuh"

#include "../../checks/ops.h"
#include "../cuda_backend.h"
#include "../numbers.cuh"

namespace viaduct::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kSumGrain = 16384;  // elements of one partial sum

/// parts[b] = sum of the b-th run of kSumGrain elements, in F64.
template <int W, typename T>
__global__ void __launch_bounds__(kThreads) sumKernel(double* parts, const T* x, int64_t n) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kSumGrain;
  const int64_t end = min(begin + kSumGrain, n);
  const int64_t packsEnd = begin + (end - begin) / W * W;
  double total = 0;
  for (int64_t i = begin + threadIdx.x * W; i < packsEnd; i += kThreads * W) {
    const Pack<T, W> v = *reinterpret_cast<const Pack<T, W>*>(x + i);
#pragma unroll
    for (int k = 0; k < W; ++k) total += static_cast<double>(widen(v.at[k]));
  }
  for (int64_t i = packsEnd + threadIdx.x; i < end; i += kThreads) total += static_cast<double>(widen(x[i]));
  total = blockSum<kThreads>(total);
  if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads) sumPartsKernel(float* y, const double* parts, int64_t n) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) total += parts[i];
  total = blockSum<kThreads>(total);
  if (threadIdx.x == 0) *y = static_cast<float>(total);
}

// sumRows: a block sums a run of rows in 32 packs of columns; its 8 warps take rows in turn.
constexpr int kRowWarps = 8;

int64_t rowsOfPart(int64_t rows) { return std::max<int64_t>(128, (rows + 255) / 256); }

/// parts[p, c] = sum over the p-th run of rows; with `add` there is one run and acc[c] += it.
template <int W, typename T>
__global__ void __launch_bounds__(kWarp* kRowWarps)
    sumRowsKernel(float* parts, const T* x, int64_t stride, int64_t rows, int64_t columns, int64_t rowsPerPart,
                  bool add) {
  __shared__ float sums[kRowWarps][kWarp][W];
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x) * W;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * rowsPerPart;
  const int64_t end = min(begin + rowsPerPart, rows);
  float total[W] = {};
  if (column < columns) {
#pragma unroll 4
    for (int64_t r = begin + threadIdx.y; r < end; r += kRowWarps) {
      const Pack<T, W> v = *reinterpret_cast<const Pack<T, W>*>(x + r * stride + column);
#pragma unroll
      for (int k = 0; k < W; ++k) total[k] += widen(v.at[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < W; ++k) sums[threadIdx.y][threadIdx.x][k] = total[k];
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
  float* out = parts + (add ? 0 : blockIdx.y * columns) + column;
#pragma unroll
  for (int k = 0; k < W; ++k) {
    float sum = sums[0][threadIdx.x][k];
#pragma unroll
    for (int w = 1; w < kRowWarps; ++w) sum += sums[w][threadIdx.x][k];
    out[k] = add ? out[k] + sum : sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    addPartsKernel(float* acc, const float* parts, int64_t count, int64_t columns) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= columns) return;
  float total = parts[column];
  for (int64_t p = 1; p < count; ++p) total += parts[p * columns + column];
  acc[column] += total;
}

template <int W, typename T>
void startSumRows(const Launch& on, float* acc, float* parts, const TensorRef& x, int64_t count) {
  const int64_t columns = x.dim(1);
  const dim3 grid(static_cast<unsigned>((columns + kWarp * W - 1) / (kWarp * W)), static_cast<unsigned>(count));
  on(sumRowsKernel<W, T>, grid, dim3(kWarp, kRowWarps), count == 1 ? acc : parts, x.as<T>(), x.stride[0], x.dim(0),
     columns, rowsOfPart(x.dim(0)), count == 1);
  if (count == 1) return;
  on(addPartsKernel, static_cast<unsigned>((columns + kThreads - 1) / kThreads), kThreads, acc, parts, count, columns);
}

}  // namespace

void CudaBackend::sum(Stream& s, Out y, In x) {
  checkSum(y, x);
  const int64_t n = x.numel();
  const int64_t parts = (n + kSumGrain - 1) / kSumGrain;
  const Scratch scratch(*this, s, static_cast<size_t>(parts) * sizeof(double));
  const Launch on(s);
  s.enqueue("sum", [=, partial = scratch.as<double>()] {
    dispatchFloat(x.dtype, [&](auto zero) {
      using T = decltype(zero);
      if (packable(x.as<T>())) {
        on(sumKernel<kPackOf<T>, T>, static_cast<unsigned>(parts), kThreads, partial, x.as<T>(), n);
      } else {
        on(sumKernel<1, T>, static_cast<unsigned>(parts), kThreads, partial, x.as<T>(), n);
      }
    });
    on(sumPartsKernel, 1, kThreads, y.as<float>(), partial, parts);
  });
}

void CudaBackend::sumRows(Stream& s, InOut acc, In x) {
  checkSumRows(acc, x);
  if (x.numel() == 0) return;
  const int64_t perPart = rowsOfPart(x.dim(0));
  const int64_t count = (x.dim(0) + perPart - 1) / perPart;
  const Scratch scratch(*this, s, count == 1 ? 0 : static_cast<size_t>(count * x.dim(1)) * sizeof(float));
  const Launch on(s);
  s.enqueue("sumRows", [=, parts = scratch.as<float>()] {
    dispatchFloat(x.dtype, [&](auto zero) {
      using T = decltype(zero);
      constexpr int kPack = kPackOf<T>;
      if (packable(x.as<T>()) && x.dim(1) % kPack == 0 && (x.dim(0) == 1 || x.stride[0] % kPack == 0)) {
        startSumRows<kPack, T>(on, acc.as<float>(), parts, x, count);
      } else {
        startSumRows<1, T>(on, acc.as<float>(), parts, x, count);
      }
    });
  });
}

namespace {
const Support support{{"sum", Takes::Float}, {"sumRows", Takes::Float}};
}

}  // namespace viaduct::cuda
