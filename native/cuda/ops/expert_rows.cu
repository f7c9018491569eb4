// Rows on their way to experts and back: copied, weighed and added up in F32, in the order of a token's choices. A block takes a row.
#include "../../checks/ops.h"
#include "../cuda_backend.h"
#include "../launch.cuh"
#include "../numbers.cuh"
#include "../reduce.cuh"

namespace viaduct::cuda {

namespace {

constexpr int kThreads = 128;

template <typename T>
struct RowsIn {
  T* data;
  int64_t stride;
  int64_t count;
  explicit RowsIn(const TensorRef& x) : data(x.as<T>()), stride(x.stride[0]), count(x.dim(0)) {}
  __device__ T* operator[](int64_t row) const { return data + row * stride; }
  bool packs(int W) const { return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % W == 0; }
};

template <int W, typename T>
__device__ __forceinline__ void load(const T* from, float (&v)[W]) {
  widenAll(*reinterpret_cast<const Pack<T, W>*>(from), v);
}

/// y[i] = x[source[i] / K] (* weights[source[i]]).
template <int W, typename T>
__global__ void __launch_bounds__(kThreads) spreadKernel(RowsIn<T> y, RowsIn<const T> x, const int32_t* source,
                                                         const float* weights, int64_t K, int64_t width) {
  const int64_t from = source[blockIdx.x];
  const bool here = from >= 0 && from / K < x.count;
  const float weight = here && weights != nullptr ? weights[from] : 1.0f;
  const T* in = x[here ? from / K : 0];
  T* out = y[blockIdx.x];
  for (int64_t c = threadIdx.x * W; c < width; c += kThreads * W) {
    float v[W] = {};
    if (here) load(in + c, v);
#pragma unroll
    for (int k = 0; k < W; ++k) v[k] *= weight;
    *reinterpret_cast<Pack<T, W>*>(out + c) = narrowAll<T>(v);
  }
}

/// y[t] = sum over k of (weights[t, k] *) x[place[t, k] - first].
template <int W, typename T>
__global__ void __launch_bounds__(kThreads)
    combineKernel(RowsIn<T> y, RowsIn<const T> x, const int32_t* place, const float* weights, int64_t K, int64_t first,
                  int64_t width) {
  const int32_t* at = place + blockIdx.x * K;
  T* out = y[blockIdx.x];
  for (int64_t c = threadIdx.x * W; c < width; c += kThreads * W) {
    float sum[W] = {};
    for (int64_t k = 0; k < K; ++k) {
      const int64_t row = at[k] - first;
      if (row < 0 || row >= x.count) continue;
      const float weight = weights != nullptr ? weights[blockIdx.x * K + k] : 1.0f;
      float v[W];
      load(x[row] + c, v);
#pragma unroll
      for (int w = 0; w < W; ++w) sum[w] += weight * v[w];
    }
    *reinterpret_cast<Pack<T, W>*>(out + c) = narrowAll<T>(sum);
  }
}

/// dWeights[i] = dy[i / K] . x[place[i] - first], a block for each.
template <int W, typename T>
__global__ void __launch_bounds__(kThreads)
    combineWeightsKernel(float* dWeights, RowsIn<const T> dy, RowsIn<const T> x, const int32_t* place, int64_t K,
                         int64_t first, int64_t width) {
  const int64_t row = place[blockIdx.x] - first;
  float sum = 0;
  if (row >= 0 && row < x.count) {
    const T *a = dy[blockIdx.x / K], *b = x[row];
    for (int64_t c = threadIdx.x * W; c < width; c += kThreads * W) {
      float u[W], v[W];
      load(a + c, u);
      load(b + c, v);
#pragma unroll
      for (int w = 0; w < W; ++w) sum += u[w] * v[w];
    }
  }
  sum = blockSum<kThreads>(sum);
  if (threadIdx.x == 0) dWeights[blockIdx.x] = sum;
}

/// Calls f(zero of the storage type, width of a pack) for rows of `width` that all may be read in packs, or element by element.
template <typename F>
void dispatchRows(const TensorRef& a, const TensorRef& b, int64_t width, F&& f) {
  dispatchFloat(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kPack = kPackOf<T>;
    const bool packs = RowsIn<T>(a).packs(kPack) && RowsIn<T>(b).packs(kPack) && width % kPack == 0;
    packs ? f(zero, std::integral_constant<int, kPack>{}) : f(zero, std::integral_constant<int, 1>{});
  });
}

const float* optional(const TensorRef& x) { return x.present() ? x.as<const float>() : nullptr; }

}  // namespace

void CudaBackend::spreadRows(Stream& s, Out y, In x, In source, OptIn weights, int64_t K) {
  checkSpreadRows(y, x, source, weights, K);
  const Launch on(s);
  s.enqueue("spreadRows", [=] {
    dispatchRows(y, x, y.dim(1), [&](auto zero, auto pack) {
      using T = decltype(zero);
      on(spreadKernel<decltype(pack)::value, T>, static_cast<unsigned>(y.dim(0)), kThreads, RowsIn<T>(y),
         RowsIn<const T>(x), source.as<const int32_t>(), optional(weights), K, y.dim(1));
    });
  });
}

void CudaBackend::combineRows(Stream& s, Out y, In x, In place, OptIn weights, int64_t first) {
  checkCombineRows(y, x, place, weights);
  const Launch on(s);
  s.enqueue("combineRows", [=] {
    dispatchRows(y, x, y.dim(1), [&](auto zero, auto pack) {
      using T = decltype(zero);
      on(combineKernel<decltype(pack)::value, T>, static_cast<unsigned>(y.dim(0)), kThreads, RowsIn<T>(y),
         RowsIn<const T>(x), place.as<const int32_t>(), optional(weights), place.dim(1), first, y.dim(1));
    });
  });
}

void CudaBackend::combineRowsBackwardWeights(Stream& s, Out dWeights, In dy, In x, In place, int64_t first) {
  checkCombineRowsBackwardWeights(dWeights, dy, x, place);
  const Launch on(s);
  s.enqueue("combineRowsBackwardWeights", [=] {
    dispatchRows(dy, x, x.dim(1), [&](auto zero, auto pack) {
      using T = decltype(zero);
      on(combineWeightsKernel<decltype(pack)::value, T>, static_cast<unsigned>(place.numel()), kThreads,
         dWeights.as<float>(), RowsIn<const T>(dy), RowsIn<const T>(x), place.as<const int32_t>(), place.dim(1), first,
         x.dim(1));
    });
  });
}

namespace {
const Support support{
    {"spreadRows", Takes::Float}, {"combineRows", Takes::Float}, {"combineRowsBackwardWeights", Takes::Float}};
}

}  // namespace viaduct::cuda
