// Activation functions, plain and gated, forward and backward, computed in F32 and rounded once; gated forms in BF16 round act(gate) before the product, as Transformers does.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/activation.cc"
#include "vector_math.h"
#include "vector_pairs.h"

#ifndef VIADUCT_CPU_ACTIVATION
#define VIADUCT_CPU_ACTIVATION
#include "../backend.h"
namespace viaduct::cpu {

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

// Calls f(row, column, n) for runs of the [rows, width] elements, in parallel.
template <typename F>
HWY_INLINE void ForRuns(int64_t rows, int64_t width, F&& f) {
  const int64_t pieces = (width + kActivationGrain - 1) / kActivationGrain;
  const int64_t rowsPerTask = pieces > 1 ? 1 : std::max<int64_t>(1, kActivationGrain / std::max<int64_t>(1, width));
  const int64_t groups = (rows + rowsPerTask - 1) / rowsPerTask;
  parallelFor(groups * pieces, [=](int64_t task) HWY_ATTR {
    const int64_t first = task / pieces * rowsPerTask, last = std::min(rows, first + rowsPerTask);
    const int64_t begin = task % pieces * kActivationGrain, end = std::min(width, begin + kActivationGrain);
    for (int64_t t = first; t < last; ++t) f(t, begin, end - begin);
  });
}

struct ForwardLoop {
  template <typename Rule, typename T>
  static void run(const ActivationArgs& a) {
    const T* x = static_cast<const T*>(a.x);
    T* y = static_cast<T*>(a.y);
    ForRuns(1, a.width, [=](int64_t, int64_t c, int64_t n) HWY_ATTR {
      const auto value = [](V v) HWY_ATTR { return Rule::value(v); };
      ForPairs(n, [=](int64_t i, int64_t m) HWY_ATTR { StorePair(Each(value, LoadPair(x + c + i, m)), y + c + i, m); });
    });
  }
};

struct BackwardLoop {
  template <typename Rule, typename T>
  static void run(const ActivationArgs& a) {
    const T *x = static_cast<const T*>(a.x), *dy = static_cast<const T*>(a.dy);
    T* dx = static_cast<T*>(a.dx);
    ForRuns(1, a.width, [=](int64_t, int64_t c, int64_t n) HWY_ATTR {
      const auto back = [](V d, V v) HWY_ATTR {
        V value;
        return hn::Mul(d, Rule::slope(v, &value));
      };
      ForPairs(n, [=](int64_t i, int64_t m) HWY_ATTR {
        StorePair(Each(back, LoadPair(dy + c + i, m), LoadPair(x + c + i, m)), dx + c + i, m);
      });
    });
  }
};

struct GatedForwardLoop {
  template <typename Rule, typename T>
  static void run(const ActivationArgs& a) {
    const T* x = static_cast<const T*>(a.x);
    T* y = static_cast<T*>(a.y);
    const int64_t width = a.width;
    ForRuns(a.rows, width, [=](int64_t t, int64_t c, int64_t n) HWY_ATTR {
      const T *gate = x + t * 2 * width + c, *up = gate + width;
      T* out = y + t * width + c;
      const auto gated = [](V g, V u) HWY_ATTR { return hn::Mul(RoundTo<T>(Rule::value(g)), u); };
      ForPairs(n, [=](int64_t i, int64_t m) HWY_ATTR {
        PrefetchPair(gate + 2 * width + i);  // the next token's: runs are short
        PrefetchPair(up + 2 * width + i);
        StorePair(Each(gated, LoadPair(gate + i, m), LoadPair(up + i, m)), out + i, m);
      });
    });
  }
};

// dgate = dy * up * act'(gate), dup = dy * act(gate). A pair is read before it is written, so dx may be x.
struct GatedBackwardLoop {
  template <typename Rule, typename T>
  static void run(const ActivationArgs& a) {
    const T *x = static_cast<const T*>(a.x), *dy = static_cast<const T*>(a.dy);
    T* dx = static_cast<T*>(a.dx);
    const int64_t width = a.width;
    ForRuns(a.rows, width, [=](int64_t t, int64_t c, int64_t n) HWY_ATTR {
      const int64_t at = t * 2 * width + c;
      const T *gate = x + at, *up = gate + width, *d = dy + t * width + c;
      T *dGate = dx + at, *dUp = dGate + width;
      const auto back = [](V dOut, V u, V slope) HWY_ATTR { return hn::Mul(hn::Mul(dOut, u), slope); };
      const auto through = [](V dOut, V value) HWY_ATTR { return hn::Mul(dOut, RoundTo<T>(value)); };
      ForPairs(n, [=](int64_t i, int64_t m) HWY_ATTR {
        PrefetchPair(gate + 2 * width + i);
        PrefetchPair(up + 2 * width + i);
        const Pair g = LoadPair(gate + i, m), u = LoadPair(up + i, m), dOut = LoadPair(d + i, m);
        Pair value;
        const V first = Rule::slope(g.a, &value.a), second = Rule::slope(g.b, &value.b);
        StorePair(Each(back, dOut, u, Pair{first, second}), dGate + i, m);
        StorePair(Each(through, dOut, value), dUp + i, m);
      });
    });
  }
};

template <typename Loop, typename Rule>
void RunRule(const ActivationArgs& a) {
  a.dtype == DType::F32 ? Loop::template run<Rule, float>(a) : Loop::template run<Rule, BF16>(a);
}
template <typename Loop>
void RunLoop(const ActivationArgs& a) {
  switch (a.kind) {
    case Activation::Silu:
      return RunRule<Loop, SiluRule>(a);
    case Activation::Gelu:
      return RunRule<Loop, GeluRule>(a);
    case Activation::GeluTanh:
      return RunRule<Loop, GeluTanhRule>(a);
    case Activation::Relu:
      return RunRule<Loop, ReluRule>(a);
    case Activation::Relu2:
      return RunRule<Loop, Relu2Rule>(a);
    case Activation::QuickGelu:
      return RunRule<Loop, QuickGeluRule>(a);
    case Activation::Sigmoid:
      return RunRule<Loop, SigmoidRule>(a);
  }
}

void ActivationForwardKernel(const ActivationArgs& a) { RunLoop<ForwardLoop>(a); }
void ActivationBackwardKernel(const ActivationArgs& a) { RunLoop<BackwardLoop>(a); }
void GatedActivationForwardKernel(const ActivationArgs& a) { RunLoop<GatedForwardLoop>(a); }
void GatedActivationBackwardKernel(const ActivationArgs& a) { RunLoop<GatedBackwardLoop>(a); }

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
