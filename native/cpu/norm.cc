// RMSNorm and LayerNorm, forward and backward. x may have any number of leading dims; the last is normalised and
// contiguous. Sums over a row are F32 lanes added up in F64. In BF16 RMSNorm rounds the normalised value before it
// multiplies by the weight, as Transformers does; the zero-centred form (Gemma) multiplies in F32 by 1 + w.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/norm.cc"
#include "column_sum.h"
#include "rows.h"
#include "vector_pairs.h"

#ifndef VIADUCT_CPU_NORM
#define VIADUCT_CPU_NORM
#include <cmath>
namespace viaduct::cpu {

// Arguments of all six ops; what an op does not have is absent.
struct NormArgs {
  TensorRef y, x, residual, sum, w, bias, dy, dx, dResidual;
  float* mean = nullptr;
  float* rstd = nullptr;
  float* dw = nullptr;
  float* dBias = nullptr;
  double eps = 0;
  bool zeroCentered = false;
};

constexpr int64_t kNormGrain = 16384;  // elements of one task
inline int64_t rowGrain(int64_t width) { return std::max<int64_t>(1, kNormGrain / std::max<int64_t>(1, width)); }

}  // namespace viaduct::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {
namespace {

// Weights, in the order of rows of type T.
template <typename T, typename W>
HWY_INLINE Pair LoadWeights(const W* w, int64_t i, int64_t n, V offset) {
  const Pair v = LoadPairFor<T>(w + i, n);
  return {hn::Add(v.a, offset), hn::Add(v.b, offset)};
}
HWY_INLINE Pair Times(Pair x, Pair y) { return {hn::Mul(x.a, y.a), hn::Mul(x.b, y.b)}; }

template <typename T, typename W>
void RmsForward(const NormArgs& a) {
  const Rows<T> y(a.y), x(a.x), residual(a.residual), sum(a.sum);
  const W* w = a.w.as<W>();
  const bool hasResidual = a.residual.present(), hasSum = a.sum.present();
  const bool zeroCentered = a.zeroCentered;
  const double eps = a.eps;
  float* rstd = a.rstd;
  const int64_t width = x.width();
  parallelChunks(x.count(), rowGrain(width), [=](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t t = begin; t < end; ++t) {
      const T* h = x[t];
      double squares;
      if (hasResidual) {
        const T* r = residual[t];
        T* out = hasSum ? sum[t] : y[t];
        squares = SumPairs(width, [=](int64_t i, int64_t n) HWY_ATTR {
          const auto add = [](V x, V y) HWY_ATTR { return RoundTo<T>(hn::Add(x, y)); };
          const Pair v = Each(add, LoadPair(h + i, n), LoadPair(r + i, n));
          StorePair(v, out + i, n);
          return Times(v, v);
        });
        h = out;
      } else {
        squares = SumPairs(width, [=](int64_t i, int64_t n) HWY_ATTR {
          const Pair v = LoadPair(h + i, n);
          return Times(v, v);
        });
      }
      const float scale = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(width) + eps));
      rstd[t] = scale;
      T* out = y[t];
      const V s = Set(scale);
      if (zeroCentered) {
        const V one = Set(1.0f);
        const auto scaled = [=](V v, V weight) HWY_ATTR { return hn::Mul(hn::Mul(v, s), weight); };
        ForPairs(width, [=](int64_t i, int64_t n) HWY_ATTR {
          StorePair(Each(scaled, LoadPair(h + i, n), LoadWeights<T>(w, i, n, one)), out + i, n);
        });
      } else {
        const auto scaled = [=](V v, V weight) HWY_ATTR { return hn::Mul(RoundTo<T>(hn::Mul(v, s)), weight); };
        ForPairs(width, [=](int64_t i, int64_t n) HWY_ATTR {
          StorePair(Each(scaled, LoadPair(h + i, n), LoadPairFor<T>(w + i, n)), out + i, n);
        });
      }
    }
  });
}

// With g = dy * w: dx = rstd * (g - x * rstd^2 * mean(g * x)).
template <typename T, typename W>
void RmsBackwardInput(const NormArgs& a) {
  const Rows<T> dx(a.dx), dy(a.dy), x(a.x), dResidual(a.dResidual);
  const W* w = a.w.as<W>();
  const bool hasResidual = a.dResidual.present();
  const float offset = a.zeroCentered ? 1.0f : 0.0f;
  const float* rstd = a.rstd;
  const int64_t width = x.width();
  parallelChunks(x.count(), rowGrain(width), [=](int64_t begin, int64_t end) HWY_ATTR {
    const V plus = Set(offset);
    for (int64_t t = begin; t < end; ++t) {
      const T *xRow = x[t], *dyRow = dy[t];
      const double dot = SumPairs(width, [=](int64_t i, int64_t n) HWY_ATTR {
        return Times(Times(LoadPair(dyRow + i, n), LoadWeights<T>(w, i, n, plus)), LoadPair(xRow + i, n));
      });
      const double r = rstd[t];
      const V scale = Set(rstd[t]), back = Set(static_cast<float>(r * r * r * dot / static_cast<double>(width)));
      T* out = dx[t];
      const T* more = hasResidual ? dResidual[t] : nullptr;
      const auto slope = [=](V g, V v) HWY_ATTR { return hn::NegMulAdd(v, back, hn::Mul(g, scale)); };
      ForPairs(width, [=](int64_t i, int64_t n) HWY_ATTR {
        const Pair g = Times(LoadPair(dyRow + i, n), LoadWeights<T>(w, i, n, plus));
        Pair v = Each(slope, g, LoadPair(xRow + i, n));
        if (more != nullptr) v = Each([](V x, V y) HWY_ATTR { return hn::Add(x, y); }, v, LoadPair(more + i, n));
        StorePair(v, out + i, n);
      });
    }
  });
}

template <typename T>
void RmsBackwardWeight(const NormArgs& a) {
  const Rows<T> dy(a.dy), x(a.x);
  const float* rstd = a.rstd;
  float* const outputs[1] = {a.dw};
  SumColumns<1>(outputs, x.count(), x.width(), [=](int, int64_t t, int64_t c, int64_t n) HWY_ATTR {
    return hn::Mul(Load(dy[t] + c, n), hn::Mul(Load(x[t] + c, n), Set(rstd[t])));
  });
}

template <typename T, typename W>
void LayerForward(const NormArgs& a) {
  const Rows<T> y(a.y), x(a.x);
  const W *w = a.w.as<W>(), *bias = a.bias.present() ? a.bias.as<W>() : nullptr;
  const float offset = a.zeroCentered ? 1.0f : 0.0f;
  const double eps = a.eps;
  float *mean = a.mean, *rstd = a.rstd;
  const int64_t width = x.width();
  parallelChunks(x.count(), rowGrain(width), [=](int64_t begin, int64_t end) HWY_ATTR {
    const V plus = Set(offset);
    for (int64_t t = begin; t < end; ++t) {
      const T* h = x[t];
      const double total = SumPairs(width, [=](int64_t i, int64_t n) HWY_ATTR { return LoadPair(h + i, n); });
      mean[t] = static_cast<float>(total / static_cast<double>(width));
      const V m = Set(mean[t]);
      const double squares = SumPairs(width, [=](int64_t i, int64_t n) HWY_ATTR {
        const Pair v = Each([=](V x) HWY_ATTR { return hn::Sub(x, m); }, LoadPair(h + i, n));
        const Pair kept = KeepFirst<T>(v, n);
        return Times(kept, kept);
      });
      rstd[t] = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(width) + eps));
      const V s = Set(rstd[t]);
      T* out = y[t];
      const auto scaled = [=](V v, V weight) HWY_ATTR { return hn::Mul(hn::Mul(hn::Sub(v, m), s), weight); };
      ForPairs(width, [=](int64_t i, int64_t n) HWY_ATTR {
        Pair v = Each(scaled, LoadPair(h + i, n), LoadWeights<T>(w, i, n, plus));
        if (bias != nullptr) v = Each([](V x, V y) HWY_ATTR { return hn::Add(x, y); }, v, LoadPairFor<T>(bias + i, n));
        StorePair(v, out + i, n);
      });
    }
  });
}

// With g = dy * w and n = (x - mean) * rstd: dx = rstd * (g - mean(g) - n * mean(g * n)).
template <typename T, typename W>
void LayerBackwardInput(const NormArgs& a) {
  const Rows<T> dx(a.dx), dy(a.dy), x(a.x);
  const W* w = a.w.as<W>();
  const float offset = a.zeroCentered ? 1.0f : 0.0f;
  const float *mean = a.mean, *rstd = a.rstd;
  const int64_t width = x.width();
  parallelChunks(x.count(), rowGrain(width), [=](int64_t begin, int64_t end) HWY_ATTR {
    const V plus = Set(offset);
    for (int64_t t = begin; t < end; ++t) {
      const T *xRow = x[t], *dyRow = dy[t];
      const V m = Set(mean[t]), s = Set(rstd[t]);
      const double inverse = 1.0 / static_cast<double>(width);
      const auto normal = [=](V v) HWY_ATTR { return hn::Mul(hn::Sub(v, m), s); };
      const double sumG = SumPairs(width, [=](int64_t i, int64_t n) HWY_ATTR {
        return Times(LoadPair(dyRow + i, n), LoadWeights<T>(w, i, n, plus));
      });
      const double dot = SumPairs(width, [=](int64_t i, int64_t n) HWY_ATTR {  // lanes past n have dy = 0
        const Pair g = Times(LoadPair(dyRow + i, n), LoadWeights<T>(w, i, n, plus));
        return Times(g, Each(normal, LoadPair(xRow + i, n)));
      });
      const V meanG = Set(static_cast<float>(sumG * inverse)), meanDot = Set(static_cast<float>(dot * inverse));
      T* out = dx[t];
      const auto slope = [=](V g, V v)
                             HWY_ATTR { return hn::Mul(s, hn::NegMulAdd(normal(v), meanDot, hn::Sub(g, meanG))); };
      ForPairs(width, [=](int64_t i, int64_t n) HWY_ATTR {
        const Pair g = Times(LoadPair(dyRow + i, n), LoadWeights<T>(w, i, n, plus));
        StorePair(Each(slope, g, LoadPair(xRow + i, n)), out + i, n);
      });
    }
  });
}

template <typename T>
void LayerBackwardWeight(const NormArgs& a) {
  const Rows<T> dy(a.dy), x(a.x);
  const float *mean = a.mean, *rstd = a.rstd;
  float* const outputs[2] = {a.dw, a.dBias};
  SumColumns<2>(outputs, x.count(), x.width(), [=](int k, int64_t t, int64_t c, int64_t n) HWY_ATTR {
    const V g = Load(dy[t] + c, n);
    if (k == 1) return g;
    return hn::Mul(g, hn::Mul(hn::Sub(Load(x[t] + c, n), Set(mean[t])), Set(rstd[t])));
  });
}

// x F32 with w F32, x BF16 with w BF16 or F32.
#define VIADUCT_NORM_DTYPES(name, kernel)                        \
  void name(const NormArgs& a) {                                 \
    if (a.x.dtype == DType::F32) return kernel<float, float>(a); \
    if (a.w.dtype == DType::F32) return kernel<BF16, float>(a);  \
    kernel<BF16, BF16>(a);                                       \
  }
VIADUCT_NORM_DTYPES(RmsForwardKernel, RmsForward)
VIADUCT_NORM_DTYPES(RmsBackwardInputKernel, RmsBackwardInput)
VIADUCT_NORM_DTYPES(LayerForwardKernel, LayerForward)
VIADUCT_NORM_DTYPES(LayerBackwardInputKernel, LayerBackwardInput)
#undef VIADUCT_NORM_DTYPES

void RmsBackwardWeightKernel(const NormArgs& a) {
  a.x.dtype == DType::F32 ? RmsBackwardWeight<float>(a) : RmsBackwardWeight<BF16>(a);
}
void LayerBackwardWeightKernel(const NormArgs& a) {
  a.x.dtype == DType::F32 ? LayerBackwardWeight<float>(a) : LayerBackwardWeight<BF16>(a);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "../checks/ops.h"
#include "cpu_backend.h"

namespace viaduct::cpu {

HWY_EXPORT(RmsForwardKernel);
HWY_EXPORT(RmsBackwardInputKernel);
HWY_EXPORT(RmsBackwardWeightKernel);
HWY_EXPORT(LayerForwardKernel);
HWY_EXPORT(LayerBackwardInputKernel);
HWY_EXPORT(LayerBackwardWeightKernel);

void CpuBackend::rmsNormForward(Stream& s, Out y, Out rstd, OptOut sum, In x, OptIn residual, In w, double eps,
                                bool zeroCentered) {
  checkRmsNormForward(y, rstd, sum, x, residual, w);
  NormArgs a;
  a.y = y, a.x = x, a.residual = residual, a.sum = sum, a.w = w;
  a.rstd = rstd.as<float>(), a.eps = eps, a.zeroCentered = zeroCentered;
  s.enqueue("rmsNormForward", [a] { HWY_DYNAMIC_DISPATCH(RmsForwardKernel)(a); });
}

void CpuBackend::rmsNormBackwardInput(Stream& s, Out dx, In dy, In x, In w, In rstd, OptIn dResidual,
                                      bool zeroCentered) {
  checkRmsNormBackwardInput(dx, dy, x, w, rstd, dResidual);
  NormArgs a;
  a.dx = dx, a.dy = dy, a.x = x, a.w = w, a.dResidual = dResidual;
  a.rstd = rstd.as<float>(), a.zeroCentered = zeroCentered;
  s.enqueue("rmsNormBackwardInput", [a] { HWY_DYNAMIC_DISPATCH(RmsBackwardInputKernel)(a); });
}

void CpuBackend::rmsNormBackwardWeight(Stream& s, InOut dw, In dy, In x, In rstd) {
  checkRmsNormBackwardWeight(dw, dy, x, rstd);
  NormArgs a;
  a.dy = dy, a.x = x, a.dw = dw.as<float>(), a.rstd = rstd.as<float>();
  s.enqueue("rmsNormBackwardWeight", [a] { HWY_DYNAMIC_DISPATCH(RmsBackwardWeightKernel)(a); });
}

void CpuBackend::layerNormForward(Stream& s, Out y, Out mean, Out rstd, In x, In w, OptIn bias, double eps,
                                  bool zeroCentered) {
  checkLayerNormForward(y, mean, rstd, x, w, bias);
  NormArgs a;
  a.y = y, a.x = x, a.w = w, a.bias = bias;
  a.mean = mean.as<float>(), a.rstd = rstd.as<float>(), a.eps = eps, a.zeroCentered = zeroCentered;
  s.enqueue("layerNormForward", [a] { HWY_DYNAMIC_DISPATCH(LayerForwardKernel)(a); });
}

void CpuBackend::layerNormBackwardInput(Stream& s, Out dx, In dy, In x, In w, In mean, In rstd, bool zeroCentered) {
  checkLayerNormBackwardInput(dx, dy, x, w, mean, rstd);
  NormArgs a;
  a.dx = dx, a.dy = dy, a.x = x, a.w = w;
  a.mean = mean.as<float>(), a.rstd = rstd.as<float>(), a.zeroCentered = zeroCentered;
  s.enqueue("layerNormBackwardInput", [a] { HWY_DYNAMIC_DISPATCH(LayerBackwardInputKernel)(a); });
}

void CpuBackend::layerNormBackwardWeight(Stream& s, InOut dw, OptInOut dBias, In dy, In x, In mean, In rstd) {
  checkLayerNormBackwardWeight(dw, dBias, dy, x, mean, rstd);
  NormArgs a;
  a.dy = dy, a.x = x, a.dw = dw.as<float>(), a.dBias = dBias.present() ? dBias.as<float>() : nullptr;
  a.mean = mean.as<float>(), a.rstd = rstd.as<float>();
  s.enqueue("layerNormBackwardWeight", [a] { HWY_DYNAMIC_DISPATCH(LayerBackwardWeightKernel)(a); });
}

}  // namespace viaduct::cpu
#endif  // HWY_ONCE
