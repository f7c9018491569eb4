// Activation functions, plain and gated, forward and backward. Blocks are widened to F32, the function runs on them,
// the result is rounded once; gated forms in BF16 round act(gate) before the product, as Transformers does.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/activation.cc"
#include "vector_math.h"
#include "vectors.h"

#ifndef VIADUCT_CPU_ACTIVATION
#define VIADUCT_CPU_ACTIVATION
#include "../backend.h"
namespace viaduct::cpu {

constexpr int64_t kBlock = 512;             // elements that stay in the first cache between two loops
constexpr int64_t kActivationGrain = 8192;  // elements of one task

struct ActivationArgs {
  DType dtype = DType::F32;
  Activation kind = Activation::Silu;
  void* y = nullptr;
  const void* x = nullptr;
  const void* dy = nullptr;
  void* dx = nullptr;
  int64_t rows = 0;   // gated: tokens; plain: 1
  int64_t width = 0;  // F
};

}  // namespace viaduct::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {
namespace {

// value(x) and slope(x, &y): the function, and the function with its derivative.
struct SiluRule {
  static HWY_INLINE V value(V x) { return TimesLogistic(x, x); }
  static HWY_INLINE V slope(V x, V* y) {
    V rest;
    const V s = Logistic(x, &rest);
    *y = hn::Mul(hn::Max(Set(-1e3f), x), s);
    return hn::MulAdd(*y, rest, s);
  }
};
struct GeluRule {
  static HWY_INLINE V value(V x) {
    V cdf, pdf;
    Normal(x, &cdf, &pdf);
    return hn::Mul(hn::Max(Set(-1e3f), x), cdf);
  }
  static HWY_INLINE V slope(V x, V* y) {
    V cdf, pdf;
    Normal(x, &cdf, &pdf);
    *y = hn::Mul(hn::Max(Set(-1e3f), x), cdf);
    return hn::MulAdd(x, pdf, cdf);
  }
};
// (1 + tanh(z)) / 2 is the logistic function of 2z: no cancellation for negative x.
struct GeluTanhRule {
  static constexpr float kTwice = 1.5957691216057308f;  // 2 sqrt(2 / pi)
  static constexpr float kCubic = 0.044715f;
  static HWY_INLINE V value(V x) {
    const V square = hn::Mul(x, x);
    const V z = hn::Mul(hn::Mul(x, Set(kTwice)), hn::MulAdd(square, Set(kCubic), Set(1.0f)));
    return TimesLogistic(x, z);
  }
  static HWY_INLINE V slope(V x, V* y) {
    const V square = hn::Mul(x, x);
    const V z = hn::Mul(hn::Mul(x, Set(kTwice)), hn::MulAdd(square, Set(kCubic), Set(1.0f)));
    const V dz = hn::Mul(Set(kTwice), hn::MulAdd(square, Set(3 * kCubic), Set(1.0f)));
    V rest;
    const V s = Logistic(z, &rest);
    *y = hn::Mul(hn::Max(Set(-1e3f), x), s);
    return hn::MulAdd(hn::Mul(*y, rest), dz, s);
  }
};
struct ReluRule {
  static HWY_INLINE V value(V x) { return hn::IfThenZeroElse(hn::Le(x, Zero()), x); }
  static HWY_INLINE V slope(V x, V* y) {
    *y = value(x);
    return hn::IfThenZeroElse(hn::Le(x, Zero()), Set(1.0f));
  }
};
struct Relu2Rule {
  static HWY_INLINE V value(V x) {
    const V r = ReluRule::value(x);
    return hn::Mul(r, r);
  }
  static HWY_INLINE V slope(V x, V* y) {
    const V r = ReluRule::value(x);
    *y = hn::Mul(r, r);
    return hn::Add(r, r);
  }
};
struct QuickGeluRule {
  static HWY_INLINE V value(V x) { return TimesLogistic(x, hn::Mul(x, Set(1.702f))); }
  static HWY_INLINE V slope(V x, V* y) {
    V rest;
    const V s = Logistic(hn::Mul(x, Set(1.702f)), &rest);
    *y = hn::Mul(hn::Max(Set(-1e3f), x), s);
    return hn::MulAdd(hn::Mul(*y, rest), Set(1.702f), s);
  }
};
struct SigmoidRule {
  static HWY_INLINE V value(V x) {
    V rest;
    return Logistic(x, &rest);
  }
  static HWY_INLINE V slope(V x, V* y) {
    V rest;
    *y = Logistic(x, &rest);
    return hn::Mul(*y, rest);
  }
};

// In blocks of F32: y = act(x), and d = act'(x) where d is given. Buffers are whole vectors long.
template <typename Rule>
HWY_NOINLINE void Evaluate(const float* x, float* y, float* d, int64_t size) {
  if (d == nullptr) {
    for (int64_t i = 0; i < size; i += kLanes) Store(Rule::value(Load(x + i)), y + i);
    return;
  }
  for (int64_t i = 0; i < size; i += kLanes) {
    V value;
    Store(Rule::slope(Load(x + i), &value), d + i);
    Store(value, y + i);
  }
}

HWY_INLINE void Activate(Activation kind, const float* x, float* y, float* d, int64_t size) {
  switch (kind) {
    case Activation::Silu:
      return Evaluate<SiluRule>(x, y, d, size);
    case Activation::Gelu:
      return Evaluate<GeluRule>(x, y, d, size);
    case Activation::GeluTanh:
      return Evaluate<GeluTanhRule>(x, y, d, size);
    case Activation::Relu:
      return Evaluate<ReluRule>(x, y, d, size);
    case Activation::Relu2:
      return Evaluate<Relu2Rule>(x, y, d, size);
    case Activation::QuickGelu:
      return Evaluate<QuickGeluRule>(x, y, d, size);
    case Activation::Sigmoid:
      return Evaluate<SigmoidRule>(x, y, d, size);
  }
}

// Filled before it is read, one vector past the elements: the compiler cannot see that.
#if HWY_COMPILER_GCC_ACTUAL
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
struct Blocks {
  alignas(64) float in[kBlock];
  alignas(64) float value[kBlock];
  alignas(64) float slope[kBlock];
};

// Widens n elements, the last vector filled up with zeros.
template <typename T>
HWY_INLINE void Widen(const T* x, float* out, int64_t n) {
  ForVectors(n, [=](int64_t i, int64_t m) HWY_ATTR { Store(Load(x + i, m), out + i); });
}

// Calls f(row, column, n) for blocks of the [rows, width] elements, in parallel.
template <typename F>
HWY_INLINE void ForBlocks(int64_t rows, int64_t width, F&& f) {
  const int64_t pieces = (width + kActivationGrain - 1) / kActivationGrain;
  const int64_t rowsPerTask = pieces > 1 ? 1 : std::max<int64_t>(1, kActivationGrain / std::max<int64_t>(1, width));
  const int64_t groups = (rows + rowsPerTask - 1) / rowsPerTask;
  parallelFor(groups * pieces, [=](int64_t task) HWY_ATTR {
    const int64_t first = task / pieces * rowsPerTask, last = std::min(rows, first + rowsPerTask);
    const int64_t begin = task % pieces * kActivationGrain, end = std::min(width, begin + kActivationGrain);
    for (int64_t t = first; t < last; ++t)
      for (int64_t c = begin; c < end; c += kBlock) f(t, c, std::min(kBlock, end - c));
  });
}

template <typename T>
void ForwardLoop(const ActivationArgs& args) {
  const ActivationArgs a = args;
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  ForBlocks(1, a.width, [=](int64_t, int64_t c, int64_t n) HWY_ATTR {
    Blocks b;
    Widen(x + c, b.in, n);
    Activate(a.kind, b.in, b.value, nullptr, n);
    ForVectors(n, [&](int64_t i, int64_t m) HWY_ATTR { Store(Load(b.value + i), y + c + i, m); });
  });
}

template <typename T>
void BackwardLoop(const ActivationArgs& args) {
  const ActivationArgs a = args;
  const T *x = static_cast<const T*>(a.x), *dy = static_cast<const T*>(a.dy);
  T* dx = static_cast<T*>(a.dx);
  ForBlocks(1, a.width, [=](int64_t, int64_t c, int64_t n) HWY_ATTR {
    Blocks b;
    Widen(x + c, b.in, n);
    Activate(a.kind, b.in, b.value, b.slope, n);
    ForVectors(n, [&](int64_t i, int64_t m)
                      HWY_ATTR { Store(hn::Mul(Load(dy + c + i, m), Load(b.slope + i)), dx + c + i, m); });
  });
}

template <typename T>
void GatedForwardLoop(const ActivationArgs& args) {
  const ActivationArgs a = args;
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  ForBlocks(a.rows, a.width, [=](int64_t t, int64_t c, int64_t n) HWY_ATTR {
    const T *gate = x + t * 2 * a.width + c, *up = gate + a.width;
    T* out = y + t * a.width + c;
    Blocks b;
    Widen(gate, b.in, n);
    Activate(a.kind, b.in, b.value, nullptr, n);
    ForVectors(n, [&](int64_t i, int64_t m)
                      HWY_ATTR { Store(hn::Mul(RoundTo<T>(Load(b.value + i)), Load(up + i, m)), out + i, m); });
  });
}

// dgate = dy * up * act'(gate), dup = dy * act(gate). A block is read before it is written, so dx may be x.
template <typename T>
void GatedBackwardLoop(const ActivationArgs& args) {
  const ActivationArgs a = args;
  const T *x = static_cast<const T*>(a.x), *dy = static_cast<const T*>(a.dy);
  T* dx = static_cast<T*>(a.dx);
  ForBlocks(a.rows, a.width, [=](int64_t t, int64_t c, int64_t n) HWY_ATTR {
    const int64_t at = t * 2 * a.width + c;
    const T *up = x + at + a.width, *d = dy + t * a.width + c;
    T *dGate = dx + at, *dUp = dGate + a.width;
    Blocks b;
    Widen(x + at, b.in, n);
    Activate(a.kind, b.in, b.value, b.slope, n);
    ForVectors(n, [&](int64_t i, int64_t m) HWY_ATTR {
      const V g = Load(d + i, m), u = Load(up + i, m);
      Store(hn::Mul(hn::Mul(g, u), Load(b.slope + i)), dGate + i, m);
      Store(hn::Mul(g, RoundTo<T>(Load(b.value + i))), dUp + i, m);
    });
  });
}

void ActivationForwardKernel(const ActivationArgs& a) {
  a.dtype == DType::F32 ? ForwardLoop<float>(a) : ForwardLoop<BF16>(a);
}
void ActivationBackwardKernel(const ActivationArgs& a) {
  a.dtype == DType::F32 ? BackwardLoop<float>(a) : BackwardLoop<BF16>(a);
}
void GatedActivationForwardKernel(const ActivationArgs& a) {
  a.dtype == DType::F32 ? GatedForwardLoop<float>(a) : GatedForwardLoop<BF16>(a);
}
void GatedActivationBackwardKernel(const ActivationArgs& a) {
  a.dtype == DType::F32 ? GatedBackwardLoop<float>(a) : GatedBackwardLoop<BF16>(a);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "../checks/ops.h"
#include "cpu_backend.h"

namespace viaduct::cpu {

HWY_EXPORT(ActivationForwardKernel);
HWY_EXPORT(ActivationBackwardKernel);
HWY_EXPORT(GatedActivationForwardKernel);
HWY_EXPORT(GatedActivationBackwardKernel);

void CpuBackend::gatedActivationForward(Stream& s, Out y, In x, Activation kind) {
  checkGatedActivationForward(y, x, kind);
  ActivationArgs a{x.dtype, kind, y.data, x.data, nullptr, nullptr, x.dim(0), x.dim(1) / 2};
  s.enqueue("gatedActivationForward", [a] { HWY_DYNAMIC_DISPATCH(GatedActivationForwardKernel)(a); });
}

void CpuBackend::gatedActivationBackward(Stream& s, Out dx, In dy, In x, Activation kind) {
  checkGatedActivationBackward(dx, dy, x, kind);
  ActivationArgs a{x.dtype, kind, nullptr, x.data, dy.data, dx.data, x.dim(0), x.dim(1) / 2};
  s.enqueue("gatedActivationBackward", [a] { HWY_DYNAMIC_DISPATCH(GatedActivationBackwardKernel)(a); });
}

void CpuBackend::activationForward(Stream& s, Out y, In x, Activation kind) {
  checkActivationForward(y, x, kind);
  ActivationArgs a{x.dtype, kind, y.data, x.data, nullptr, nullptr, 1, x.numel()};
  s.enqueue("activationForward", [a] { HWY_DYNAMIC_DISPATCH(ActivationForwardKernel)(a); });
}

void CpuBackend::activationBackward(Stream& s, Out dx, In dy, In x, Activation kind) {
  checkActivationBackward(dx, dy, x, kind);
  ActivationArgs a{x.dtype, kind, nullptr, x.data, dy.data, dx.data, 1, x.numel()};
  s.enqueue("activationBackward", [a] { HWY_DYNAMIC_DISPATCH(ActivationBackwardKernel)(a); });
}

}  // namespace viaduct::cpu
#endif  // HWY_ONCE
