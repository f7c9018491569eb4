// Activation functions, plain and gated, forward and backward: computed in F32, rounded once; gated forms in BF16 and F16 round
// act(gate) before the product, as the CPU does (cpu/activation.cc).
#include "../../checks/ops.h"
#include "../cuda_backend.h"
#include "../launch.cuh"
#include "../numbers.cuh"

namespace viaduct::cuda {

namespace {

constexpr int kThreads = 256;

/// 1 / (1 + exp(-x)), and 1 less it, both without cancellation.
__device__ __forceinline__ float logistic(float x, float* rest) {
  const float e = expf(-fabsf(x)), large = 1.0f / (1.0f + e), small = e / (1.0f + e);
  *rest = x >= 0 ? small : large;
  return x >= 0 ? large : small;
}

/// x, but for numbers so low that the function is 0 there: no infinity times 0. A NaN stays.
__device__ __forceinline__ float bounded(float x) { return x < -1e3f ? -1e3f : x; }

/// x times the logistic function of z, and the derivative, where z(x) has the slope dz.
__device__ __forceinline__ float timesLogistic(float x, float z, float dz, float* slope) {
  float rest;
  const float s = logistic(z, &rest), y = bounded(x) * s;
  *slope = y * rest * dz + s;
  return y;
}

// Each has value(x, &slope): the function, and its derivative.
struct Silu {
  __device__ static float value(float x, float* slope) { return timesLogistic(x, x, 1.0f, slope); }
};
struct Gelu {
  __device__ static float value(float x, float* slope) {
    const float cdf = 0.5f * erfcf(x * -0.70710678118654752f);
    const float pdf = 0.39894228040143268f * expf(-0.5f * x * x);
    *slope = x * pdf + cdf;
    return bounded(x) * cdf;
  }
};
// (1 + tanh(z)) / 2 is the logistic function of 2z: no cancellation for negative x.
struct GeluTanh {
  __device__ static float value(float x, float* slope) {
    constexpr float kTwice = 1.5957691216057308f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
    const float square = x * x;
    return timesLogistic(x, x * kTwice * (square * kCubic + 1.0f), kTwice * (square * (3 * kCubic) + 1.0f), slope);
  }
};
struct Relu {
  __device__ static float value(float x, float* slope) {
    *slope = x <= 0 ? 0.0f : 1.0f;
    return x <= 0 ? 0.0f : x;
  }
};
struct Relu2 {
  __device__ static float value(float x, float* slope) {
    const float r = x <= 0 ? 0.0f : x;
    *slope = r + r;
    return r * r;
  }
};
struct QuickGelu {
  __device__ static float value(float x, float* slope) { return timesLogistic(x, x * 1.702f, 1.702f, slope); }
};
struct Sigmoid {
  __device__ static float value(float x, float* slope) {
    float rest;
    const float s = logistic(x, &rest);
    *slope = s * rest;
    return s;
  }
};

template <typename F>
void dispatchActivation(Activation kind, F&& f) {
  switch (kind) {
    case Activation::Silu:
      return f(Silu{});
    case Activation::Gelu:
      return f(Gelu{});
    case Activation::GeluTanh:
      return f(GeluTanh{});
    case Activation::Relu:
      return f(Relu{});
    case Activation::Relu2:
      return f(Relu2{});
    case Activation::QuickGelu:
      return f(QuickGelu{});
    case Activation::Sigmoid:
      return f(Sigmoid{});
  }
}

template <int W, typename T>
__device__ __forceinline__ void load(const T* from, float (&v)[W]) {
  widenAll(*reinterpret_cast<const Pack<T, W>*>(from), v);
}
template <int W, typename T>
__device__ __forceinline__ void store(T* to, const float (&v)[W]) {
  *reinterpret_cast<Pack<T, W>*>(to) = narrowAll<T>(v);
}

/// W elements from `i` on: y = act(x), or with dy the gradient of x. Each is read before it is written.
template <typename A, typename T>
struct Plain {
  T* y;
  const T *x, *dy;
  template <int W>
  __device__ void at(int64_t i) const {
    float v[W], d[W];
    load(x + i, v);
    if (dy != nullptr) load(dy + i, d);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      float slope;
      const float value = A::value(v[k], &slope);
      v[k] = dy != nullptr ? d[k] * slope : value;
    }
    store(y + i, v);
  }
};

/// W columns of y[T,F] from element `i` on; x and dx are [T,2F].
template <typename A, typename T>
struct Gated {
  T* y;
  const T *x, *dy;
  int64_t width;
  template <int W>
  __device__ void at(int64_t i) const {
    const int64_t gateAt = i + i / width * width;
    float gate[W], up[W], d[W];
    load(x + gateAt, gate);
    load(x + gateAt + width, up);
    if (dy != nullptr) load(dy + i, d);
#pragma unroll
    for (int k = 0; k < W; ++k) {
      float slope;
      const float value = widen(narrow<T>(A::value(gate[k], &slope)));
      if (dy == nullptr) {
        gate[k] = value * up[k];
      } else {
        gate[k] = d[k] * up[k] * slope;
        up[k] = d[k] * value;
      }
    }
    if (dy == nullptr) return store(y + i, gate);
    store(y + gateAt, gate);
    store(y + gateAt + width, up);
  }
};

template <int W, typename Work>
__global__ void __launch_bounds__(kThreads) activationKernel(Work work, int64_t n) {
  const int64_t packs = n / W, step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = first; i < packs; i += step) work.template at<W>(i * W);
  for (int64_t i = packs * W + first; i < n; i += step) work.template at<1>(i);
}

/// From a command.
template <typename T, typename Work>
void startActivation(const Launch& on, const Work& work, int64_t n, bool packs) {
  if (packs) {
    on(activationKernel<kPackOf<T>, Work>, on.blocksFor(n, kThreads * kPackOf<T>), kThreads, work, n);
  } else {
    on(activationKernel<1, Work>, on.blocksFor(n, kThreads), kThreads, work, n);
  }
}

/// Enqueues the plain form, or with a width the gated one; `dy` may be absent.
void enqueueActivation(Stream& s, const char* op, const TensorRef& y, const TensorRef& x, const TensorRef& dy,
                       Activation kind, int64_t width, int64_t n) {
  const Launch on(s);
  s.enqueue(op, [=] {
    dispatchFloat(x.dtype, [&](auto zero) {
      using T = decltype(zero);
      T* out = y.as<T>();
      const T *in = x.as<const T>(), *gradient = dy.present() ? dy.as<const T>() : nullptr;
      const bool packs = packable(out, in, gradient) && width % kPackOf<T> == 0;
      dispatchActivation(kind, [&](auto rule) {
        using A = decltype(rule);
        if (width > 0) {
          startActivation<T>(on, Gated<A, T>{out, in, gradient, width}, n, packs);
        } else {
          startActivation<T>(on, Plain<A, T>{out, in, gradient}, n, packs);
        }
      });
    });
  });
}

}  // namespace

void CudaBackend::gatedActivationForward(Stream& s, Out y, In x, Activation kind) {
  checkGatedActivationForward(y, x, kind);
  if (y.numel() > 0) enqueueActivation(s, "gatedActivationForward", y, x, TensorRef(), kind, x.dim(1) / 2, y.numel());
}

void CudaBackend::gatedActivationBackward(Stream& s, Out dx, In dy, In x, Activation kind) {
  checkGatedActivationBackward(dx, dy, x, kind);
  if (dy.numel() > 0) enqueueActivation(s, "gatedActivationBackward", dx, x, dy, kind, x.dim(1) / 2, dy.numel());
}

void CudaBackend::activationForward(Stream& s, Out y, In x, Activation kind) {
  checkActivationForward(y, x, kind);
  if (y.numel() > 0) enqueueActivation(s, "activationForward", y, x, TensorRef(), kind, 0, y.numel());
}

void CudaBackend::activationBackward(Stream& s, Out dx, In dy, In x, Activation kind) {
  checkActivationBackward(dx, dy, x, kind);
  if (dy.numel() > 0) enqueueActivation(s, "activationBackward", dx, x, dy, kind, 0, dy.numel());
}

namespace {
const Support support{{"gatedActivationForward", Takes::Float},
                      {"gatedActivationBackward", Takes::Float},
                      {"activationForward", Takes::Float},
                      {"activationBackward", Takes::Float}};
}

}  // namespace viaduct::cuda
