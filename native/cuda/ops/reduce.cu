// Sums: sum over all elements, sumRows over rows. Cut by shape alone and added up in order, so that equal inputs give equal
// bits on any GPU.
#include "../reduce.cuh"

#include "../../checks/ops.h"
#include "../column_sum.cuh"
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

/// The elements of x themselves.
template <int W, typename T>
struct Elements {
  const T* x;
  int64_t stride;
  __device__ void operator()(int64_t row, int64_t column, float (&v)[1][W]) const {
    widenAll(*reinterpret_cast<const Pack<T, W>*>(x + row * stride + column), v[0]);
  }
};

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
  const int64_t rows = x.dim(0), columns = x.dim(1);
  const Scratch scratch(*this, s, columnSumBytes<1>(rows, columns));
  const Launch on(s);
  s.enqueue("sumRows", [=, parts = scratch.as<float>()] {
    const ColumnSums<1> sums{{acc.as<float>()}};
    dispatchFloat(x.dtype, [&](auto zero) {
      using T = decltype(zero);
      constexpr int kPack = kPackOf<T>;
      if (packable(x.as<T>()) && columns % kPack == 0 && (rows == 1 || x.stride[0] % kPack == 0)) {
        startColumnSums<kPack>(on, sums, parts, Elements<kPack, T>{x.as<T>(), x.stride[0]}, rows, columns);
      } else {
        startColumnSums<1>(on, sums, parts, Elements<1, T>{x.as<T>(), x.stride[0]}, rows, columns);
      }
    });
  });
}

namespace {
const Support support{{"sum", Takes::Float}, {"sumRows", Takes::Float}};
}

}  // namespace viaduct::cuda
