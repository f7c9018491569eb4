// The optimizer's kernels: sums of squares in F64, the clipping factor, one fused AdamW pass. AdamW follows PyTorch's
// single-tensor form: its moments bit for bit, the parameter's change to about one rounding of the exact value.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/optimizer.cc"
#include "scratch.h"
#include "vectors.h"

#ifndef VIADUCT_CPU_OPTIMIZER
#define VIADUCT_CPU_OPTIMIZER
#include <cmath>
#include <limits>

#include "../adamw.h"
namespace viaduct::cpu {

constexpr int64_t kSquaresGrain = 65536;  // elements of one partial sum
constexpr int64_t kAdamGrain = 32768;     // elements of one task

struct AdamArgs {
  float *param, *m, *v;
  const float* grad;
  void* model;
  DType modelDtype;
  int64_t size;
  AdamwStep step;
};

}  // namespace viaduct::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {
namespace {

template <typename T>
double SquaresOf(const T* x, int64_t size) {
  VD low = hn::Zero(DD()), high = hn::Zero(DD());
  for (int64_t i = 0; i < size; i += kLanes) {
    const V v = Load(x + i, std::min(kLanes, size - i));
    const VD a = LowerF64(v), b = UpperF64(v);
    low = hn::MulAdd(a, a, low);  // the square of an F32 is exact in F64
    high = hn::MulAdd(b, b, high);
  }
  return SumF64Lanes(hn::Add(low, high));
}

void SumSquaresKernel(DType dtype, const void* x, double* partial, int64_t size) {
  parallelChunks(size, kSquaresGrain, [=](int64_t begin, int64_t end) HWY_ATTR {
    partial[begin / kSquaresGrain] = dtype == DType::F32 ? SquaresOf(static_cast<const float*>(x) + begin, end - begin)
                                                         : SquaresOf(static_cast<const BF16*>(x) + begin, end - begin);
  });
}

// p + step * m / (sqrt(v) + eps), rounded about once: each rounding of the plain formula is made good to first order.
// So the distance to PyTorch's result is PyTorch's own error (its square root is not the nearest one). step and eps
// come as a sum of two F32.
HWY_INLINE V AddQuotient(V p, V m, V v, V step, V stepLow, V eps, V epsLow) {
  const V root = hn::Sqrt(v);
  const V bottom = hn::Add(root, eps);
  const V top = hn::Mul(step, m);
  const V q = hn::Div(top, bottom);
  const V sum = hn::Add(p, q);
#if !HWY_NATIVE_FMA  // nothing tells what a rounding lost
  (void)stepLow;
  (void)epsLow;
  return sum;
#else
  const V rootLow = hn::Mul(hn::Mul(hn::NegMulAdd(root, root, v), Set(0.5f)), hn::ApproximateReciprocal(root));
  const V big = hn::Max(root, eps), small = hn::Min(root, eps);
  const V bottomLow = hn::Add(hn::Sub(small, hn::Sub(bottom, big)), hn::Add(rootLow, epsLow));
  const V topLow = hn::MulAdd(stepLow, m, hn::MulSub(step, m, top));
  const V rest = hn::Add(hn::NegMulAdd(q, bottom, top), hn::NegMulAdd(q, bottomLow, topLow));
  const V back = hn::Sub(sum, p);
  const V sumLow = hn::Add(hn::Sub(p, hn::Sub(sum, back)), hn::Sub(q, back));
  const V low = hn::MulAdd(rest, hn::ApproximateReciprocal(bottom), sumLow);
  // Zero or infinite somewhere: the plain formula stands.
  return hn::Add(sum, hn::IfThenElseZero(hn::Lt(hn::Abs(low), Set(std::numeric_limits<float>::max())), low));
#endif
}

struct NoModel {};
HWY_INLINE void StoreModel(V, NoModel*, int64_t, int64_t) {}
HWY_INLINE void StoreModel(V v, BF16* model, int64_t i, int64_t n) { Store(v, model + i, n); }
HWY_INLINE void StoreModel(V v, F16* model, int64_t i, int64_t n) {
  alignas(64) float lanes[kLanes];
  Store(v, lanes);
  for (int64_t k = 0; k < n; ++k) model[i + k] = fromFloat<F16>(lanes[k]);
}

template <typename M>
void AdamLoop(const AdamArgs& args, M* model) {
  const AdamArgs a = args;
  parallelChunks(a.size, kAdamGrain, [=](int64_t begin, int64_t end) HWY_ATTR {
    const AdamwStep& by = a.step;
    const V factor = Set(by.gradFactor), decay = Set(by.decay), beta2 = Set(by.beta2), rest2 = Set(by.rest2);
    const V step = Set(by.step), stepLow = Set(by.stepLow), eps = Set(by.eps), epsLow = Set(by.epsLow);
    // lerp as PyTorch rounds it: from the nearer end.
    const bool nearOld = by.lerp < 0.5f;
    const V weight = Set(nearOld ? by.lerp : by.lerp - 1.0f);
    ForVectors(end - begin, [=](int64_t k, int64_t n) HWY_ATTR {
      const int64_t i = begin + k;
      const V g = hn::Mul(Load(a.grad + i, n), factor);
      V p = hn::Mul(Load(a.param + i, n), decay);
      V m = Load(a.m + i, n), v = Load(a.v + i, n);
      m = hn::MulAdd(weight, hn::Sub(g, m), nearOld ? m : g);
      v = hn::MulAdd(hn::Mul(rest2, g), g, hn::Mul(v, beta2));
      p = AddQuotient(p, m, v, step, stepLow, eps, epsLow);
      Store(m, a.m + i, n);
      Store(v, a.v + i, n);
      Store(p, a.param + i, n);
      StoreModel(p, model, i, n);
    });
  });
}

void AdamKernel(const AdamArgs& a) {
  if (a.model == nullptr) return AdamLoop(a, static_cast<NoModel*>(nullptr));
  if (a.modelDtype == DType::BF16) return AdamLoop(a, static_cast<BF16*>(a.model));
  AdamLoop(a, static_cast<F16*>(a.model));
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "../checks/ops.h"
#include "cpu_backend.h"

namespace viaduct::cpu {

HWY_EXPORT(SumSquaresKernel);
HWY_EXPORT(AdamKernel);

void CpuBackend::sumSquares(Stream& s, InOut acc, In x) {
  checkSumSquares(acc, x);
  s.enqueue("sumSquares", [=] {
    const int64_t size = x.numel(), parts = (size + kSquaresGrain - 1) / kSquaresGrain;
    double* partial = scratch<double>(static_cast<size_t>(parts));
    HWY_DYNAMIC_DISPATCH(SumSquaresKernel)(x.dtype, x.data, partial, size);
    double total = 0;
    for (int64_t i = 0; i < parts; ++i) total += partial[i];
    *acc.as<double>() += total;
  });
}

void CpuBackend::clipFactor(Stream& s, Out norm, Out factor, In acc, double maxNorm) {
  checkClipFactor(norm, factor, acc);
  s.enqueue("clipFactor", [=] {
    const double total = std::sqrt(*acc.as<double>());
    *norm.as<float>() = static_cast<float>(total);
    const double ratio = maxNorm / (total + 1e-6);
    // Written so that a NaN norm gives a NaN factor.
    *factor.as<float>() = maxNorm <= 0 || ratio > 1.0 ? 1.0f : static_cast<float>(ratio);
  });
}

void CpuBackend::adamw(Stream& s, InOut param, InOut m, InOut v, OptOut model, In grad, In slots, double beta1,
                       double beta2, double eps, double weightDecay) {
  checkAdamw(param, m, v, model, grad, slots);
  s.enqueue("adamw", [=] {
    AdamArgs a;
    a.param = param.as<float>(), a.m = m.as<float>(), a.v = v.as<float>(), a.grad = grad.as<float>();
    a.model = model.present() ? model.data : nullptr;
    a.modelDtype = model.dtype;
    a.size = param.numel();
    a.step = adamwStep(slots.as<float>(), beta1, beta2, eps, weightDecay);
    if (a.size > 0) HWY_DYNAMIC_DISPATCH(AdamKernel)(a);
  });
}

}  // namespace viaduct::cpu
#endif  // HWY_ONCE
