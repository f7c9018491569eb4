// Elementwise arithmetic: add, mul, accumulate, scale, addBias. One read of each input, one write; results are computed in
// float and rounded once.
#include "../../checks/ops.h"
#include "../cuda_backend.h"
#include "../launch.cuh"
#include "../numbers.cuh"

namespace viaduct::cuda {

namespace {

constexpr int kThreads = 256;

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Mul {
  __device__ float operator()(float a, float b) const { return a * b; }
};

struct Clamp {
  float low, high;
  __device__ float operator()(float x, float) const { return x < low ? low : x > high ? high : x; }
};
struct ClampSlope {
  float low, high;
  __device__ float operator()(float dy, float x) const { return x < low || x > high ? 0.0f : dy; }
};

/// y[i] = f(a[i], b[i]), W elements at a time and the rest one by one. y may be a or b.
template <int W, typename F, typename Y, typename A, typename B>
__global__ void __launch_bounds__(kThreads) binaryKernel(F f, Y* y, const A* a, const B* b, int64_t n) {
  const int64_t packs = n / W;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = first; i < packs; i += step) {
    float va[W], vb[W];
    widenAll(reinterpret_cast<const Pack<A, W>*>(a)[i], va);
    widenAll(reinterpret_cast<const Pack<B, W>*>(b)[i], vb);
#pragma unroll
    for (int k = 0; k < W; ++k) va[k] = f(va[k], vb[k]);
    reinterpret_cast<Pack<Y, W>*>(y)[i] = narrowAll<Y>(va);
  }
  for (int64_t i = packs * W + first; i < n; i += step) y[i] = narrow<Y>(f(widen(a[i]), widen(b[i])));
}

template <typename F, typename Y, typename A, typename B>
void startBinary(const Launch& on, F f, Y* y, const A* a, const B* b, int64_t n) {
  constexpr int kPack = kPackOf<Y, A, B>;
  if (packable(y, a, b)) {
    on(binaryKernel<kPack, F, Y, A, B>, on.blocksFor(n, kThreads * kPack), kThreads, f, y, a, b, n);
  } else {
    on(binaryKernel<1, F, Y, A, B>, on.blocksFor(n, kThreads), kThreads, f, y, a, b, n);
  }
}

template <typename F>
void enqueueBinary(const char* op, Stream& s, const TensorRef& y, const TensorRef& a, const TensorRef& b, F f = {}) {
  const Launch on(s);
  s.enqueue(op, [=] {
    dispatchFloat(a.dtype, [&](auto zero) {
      using T = decltype(zero);
      startBinary(on, f, y.as<T>(), a.as<T>(), b.as<T>(), a.numel());
    });
  });
}

template <int W, typename T>
__global__ void __launch_bounds__(kThreads) scaleKernel(T* x, const float* factor, int64_t n) {
  const float f = *factor;
  const int64_t packs = n / W;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = first; i < packs; i += step) {
    float v[W];
    widenAll(reinterpret_cast<const Pack<T, W>*>(x)[i], v);
#pragma unroll
    for (int k = 0; k < W; ++k) v[k] *= f;
    reinterpret_cast<Pack<T, W>*>(x)[i] = narrowAll<T>(v);
  }
  for (int64_t i = packs * W + first; i < n; i += step) x[i] = narrow<T>(widen(x[i]) * f);
}

/// A block takes rows; its threads go along a row. With columns that W divides, packs begin at the same column in each row.
template <int W, typename T>
__global__ void __launch_bounds__(kThreads)
    addBiasKernel(T* y, const T* x, const T* bias, int64_t rows, int64_t packs) {
  for (int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; c < packs;
       c += static_cast<int64_t>(gridDim.x) * kThreads) {
    float b[W];
    widenAll(reinterpret_cast<const Pack<T, W>*>(bias)[c], b);
    for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
      float v[W];
      widenAll(reinterpret_cast<const Pack<T, W>*>(x)[r * packs + c], v);
#pragma unroll
      for (int k = 0; k < W; ++k) v[k] += b[k];
      reinterpret_cast<Pack<T, W>*>(y)[r * packs + c] = narrowAll<T>(v);
    }
  }
}

template <int W, typename T>
void startAddBias(const Launch& on, T* y, const T* x, const T* bias, int64_t rows, int64_t columns) {
  const int64_t packs = columns / W;
  const int across = static_cast<int>((packs + kThreads - 1) / kThreads);
  const int down = on.blocksFor(rows, 1, (16 + across - 1) / across);
  on(addBiasKernel<W, T>, dim3(across, down), kThreads, y, x, bias, rows, packs);
}

}  // namespace

void CudaBackend::add(Stream& s, Out y, In a, In b) {
  checkBinary("add", y, a, b);
  enqueueBinary<Add>("add", s, y, a, b);
}

void CudaBackend::mul(Stream& s, Out y, In a, In b) {
  checkBinary("mul", y, a, b);
  enqueueBinary<Mul>("mul", s, y, a, b);
}

void CudaBackend::accumulate(Stream& s, InOut acc, In x) {
  checkAccumulate(acc, x);
  const Launch on(s);
  s.enqueue("accumulate", [=] {
    dispatchFloat(x.dtype, [&](auto zero) {
      using T = decltype(zero);
      startBinary(on, Add{}, acc.as<float>(), acc.as<float>(), x.as<T>(), x.numel());
    });
  });
}

void CudaBackend::scale(Stream& s, InOut x, In factor) {
  checkScale(x, factor);
  const Launch on(s);
  s.enqueue("scale", [=] {
    dispatchFloat(x.dtype, [&](auto zero) {
      using T = decltype(zero);
      constexpr int kPack = kPackOf<T>;
      const int64_t n = x.numel();
      if (packable(x.as<T>())) {
        on(scaleKernel<kPack, T>, on.blocksFor(n, kThreads * kPack), kThreads, x.as<T>(), factor.as<float>(), n);
      } else {
        on(scaleKernel<1, T>, on.blocksFor(n, kThreads), kThreads, x.as<T>(), factor.as<float>(), n);
      }
    });
  });
}

void CudaBackend::clamp(Stream& s, Out y, In x, double low, double high) {
  checkUnary("clamp", y, x);
  enqueueBinary("clamp", s, y, x, x, Clamp{static_cast<float>(low), static_cast<float>(high)});
}

void CudaBackend::clampBackward(Stream& s, Out dx, In dy, In x, double low, double high) {
  checkBinary("clampBackward", dx, dy, x);
  enqueueBinary("clampBackward", s, dx, dy, x, ClampSlope{static_cast<float>(low), static_cast<float>(high)});
}

void CudaBackend::addBias(Stream& s, Out y, In x, In bias) {
  checkAddBias(y, x, bias);
  if (x.numel() == 0) return;
  const Launch on(s);
  s.enqueue("addBias", [=] {
    dispatchFloat(x.dtype, [&](auto zero) {
      using T = decltype(zero);
      constexpr int kPack = kPackOf<T>;
      const int64_t columns = x.dim(-1), rows = x.numel() / columns;
      if (columns % kPack == 0 && packable(y.as<T>(), x.as<T>(), bias.as<T>())) {
        startAddBias<kPack>(on, y.as<T>(), x.as<T>(), bias.as<T>(), rows, columns);
      } else {
        startAddBias<1>(on, y.as<T>(), x.as<T>(), bias.as<T>(), rows, columns);
      }
    });
  });
}

namespace {
const Support support{{"add", Takes::Float},    {"mul", Takes::Float},   {"accumulate", Takes::Float},
                      {"scale", Takes::Float},  {"clamp", Takes::Float}, {"clampBackward", Takes::Float},
                      {"addBias", Takes::Float}};
}

}  // namespace viaduct::cuda
