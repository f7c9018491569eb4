// Softmax of a block of scores with a running maximum, its gradient, and sums of value rows for decoding. Rows are padded
// to whole vectors by the caller; what lies outside of a row's visible columns is written as 0.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/attention_kernel.cc"
#include "attention_kernel.h"
#include "vector_math.h"
// vector_math.h comes before other parts of Highway
#include "hwy/cache_control.h"

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {
namespace {

// tanh to a few units in the last place: a series where the quotient would cancel.
HWY_INLINE V Tanh(V x) {
  const V a = hn::Abs(x);
  const V e = Exp(hn::Add(a, a));
  const V far = hn::Sub(Set(1.0f), hn::Div(Set(2.0f), hn::Add(e, Set(1.0f))));
  const V s = hn::Mul(a, a);
  V p = Set(21844.0f / 6081075.0f);
  p = hn::MulAdd(p, s, Set(-1382.0f / 155925.0f));
  p = hn::MulAdd(p, s, Set(62.0f / 2835.0f));
  p = hn::MulAdd(p, s, Set(-17.0f / 315.0f));
  p = hn::MulAdd(p, s, Set(2.0f / 15.0f));
  p = hn::MulAdd(p, s, Set(-1.0f / 3.0f));
  const V near = hn::MulAdd(hn::Mul(a, s), p, a);
  return hn::CopySign(hn::IfThenElse(hn::Lt(a, Set(0.3f)), near, far), x);
}

// Sets x[0, lo) and x[hi, n rounded up) to value and narrows [begin, end) to the whole vectors that hold [lo, hi).
HWY_INLINE void Bound(float* x, int64_t n, Visible v, float value, int64_t* begin, int64_t* end) {
  const int64_t width = (n + kLanes - 1) / kLanes * kLanes;
  if (v.lo >= v.hi) v.lo = v.hi = 0;
  *begin = v.lo / kLanes * kLanes;
  *end = (v.hi + kLanes - 1) / kLanes * kLanes;
  for (int64_t j = *begin; j < v.lo; ++j) x[j] = value;
  for (int64_t j = v.hi; j < *end; ++j) x[j] = value;
  for (int64_t j = 0; j < *begin; j += kLanes) Store(Zero(), x + j);
  for (int64_t j = *end; j < width; j += kLanes) Store(Zero(), x + j);
}

constexpr float kNothing = -HUGE_VALF;

void SoftmaxBlock(float* scores, int64_t ld, int64_t rows, int64_t n, const Visible* visible, float scale,
                  float softcap, float* m, float* l, float* correction) {
  const DF d;
  for (int64_t r = 0; r < rows; ++r) {
    float* x = scores + r * ld;
    int64_t begin, end;
    if (softcap > 0) {
      const Visible& v = visible[r];
      for (int64_t j = v.lo / kLanes * kLanes; j < v.hi; j += kLanes)
        Store(hn::Mul(Set(softcap), Tanh(hn::Mul(Load(x + j), Set(scale / softcap)))), x + j);
    }
    const V factor = Set(softcap > 0 ? 1.0f : scale);  // above 0
    Bound(x, n, visible[r], kNothing, &begin, &end);
    if (begin == end) {
      correction[r] = 1.0f;
      continue;
    }
    V most = Load(x + begin);
    for (int64_t j = begin + kLanes; j < end; j += kLanes) most = hn::Max(most, Load(x + j));
    const float top = std::max(m[r], hn::GetLane(hn::MaxOfLanes(d, hn::Mul(most, factor))));
    const V shift = Set(top == kNothing ? 0.0f : top);
    V sum = Zero();
    for (int64_t j = begin; j < end; j += kLanes) {
      const V p = ExpBelow(hn::MulSub(Load(x + j), factor, shift));
      sum = hn::Add(sum, p);
      Store(p, x + j);
    }
    const float old = m[r] == kNothing ? 0.0f : hn::GetLane(ExpBelow(Set(m[r] - top)));
    correction[r] = old;
    l[r] = l[r] * old + hn::GetLane(hn::SumOfLanes(d, sum));
    m[r] = top;
  }
}

void ScaleRows(float* x, int64_t ld, int64_t rows, int64_t n, const float* factor) {
  for (int64_t r = 0; r < rows; ++r) {
    if (factor[r] == 1.0f) continue;
    float* row = x + r * ld;
    const V f = Set(factor[r]);
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) Store(hn::Mul(Load(row + j), f), row + j);
    for (; j < n; ++j) row[j] *= factor[r];
  }
}

void ProbabilitiesBlock(float* scores, float* slope, int64_t ld, int64_t rows, int64_t n, const Visible* visible,
                        float scale, float softcap, const float* lse) {
  for (int64_t r = 0; r < rows; ++r) {
    float* x = scores + r * ld;
    int64_t begin, end;
    if (softcap > 0) {
      const Visible& v = visible[r];
      float* s = slope + r * ld;
      for (int64_t j = v.lo / kLanes * kLanes; j < v.hi; j += kLanes) {
        const V t = Tanh(hn::Mul(Load(x + j), Set(scale / softcap)));
        Store(hn::NegMulAdd(t, t, Set(1.0f)), s + j);
        Store(hn::Mul(Set(softcap), t), x + j);
      }
    }
    Bound(x, n, visible[r], kNothing, &begin, &end);
    const V shift = Set(lse[r]), factor = Set(softcap > 0 ? 1.0f : scale);
    for (int64_t j = begin; j < end; j += kLanes) Store(ExpBelow(hn::MulSub(Load(x + j), factor, shift)), x + j);
  }
}

void ScoreGradientsBlock(float* g, const float* p, const float* slope, int64_t ld, int64_t rows, int64_t n,
                         const Visible* visible, const float* delta) {
  for (int64_t r = 0; r < rows; ++r) {
    float* x = g + r * ld;
    const float* pr = p + r * ld;
    int64_t begin, end;
    Bound(x, n, visible[r], 0.0f, &begin, &end);
    const V shift = Set(delta[r]);
    if (slope != nullptr) {
      const float* s = slope + r * ld;
      for (int64_t j = begin; j < end; j += kLanes)
        Store(hn::Mul(hn::Mul(Load(pr + j), hn::Sub(Load(x + j), shift)), Load(s + j)), x + j);
    } else {
      for (int64_t j = begin; j < end; j += kLanes) Store(hn::Mul(Load(pr + j), hn::Sub(Load(x + j), shift)), x + j);
    }
    for (int64_t j = begin; j < visible[r].lo && j < end; ++j) x[j] = 0.0f;
    for (int64_t j = visible[r].hi; j < end; ++j) x[j] = 0.0f;
  }
}

float DotRow(const float* a, const float* b, int64_t n) {
  const DF d;
  V sum = Zero();
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) sum = hn::MulAdd(Load(a + j), Load(b + j), sum);
  if (j < n) sum = hn::MulAdd(Load(a + j, n - j), Load(b + j, n - j), sum);
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

template <typename T>
HWY_NOINLINE void SumRows(float* out, int64_t ldo, const float* p, int64_t ldp, const T* v, int64_t ldv, int64_t rows,
                          int64_t keys, int64_t n, bool add) {
  constexpr int64_t kAhead = 16;  // rows: those of one head lie too far apart for the hardware to foresee
  for (int64_t r = 0; r < rows; r += 2) {
    const float* p0 = p + r * ldp;
    const float* p1 = r + 1 < rows ? p0 + ldp : p0;
    float* o0 = out + r * ldo;
    float* o1 = o0 + ldo;
    int64_t j = 0;
    for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
      V a0 = Zero(), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
      const T* x = v + j;
      for (int64_t i = 0; i < keys; ++i, x += ldv) {
        for (int64_t e = 0; e < 4 * kLanes; e += 64 / static_cast<int64_t>(sizeof(T)))
          hwy::Prefetch(x + kAhead * ldv + e);  // past the end at worst: a prefetch of no memory does nothing
        const V w0 = Set(p0[i]), w1 = Set(p1[i]);
        const V x0 = Load(x), x1 = Load(x + kLanes), x2 = Load(x + 2 * kLanes), x3 = Load(x + 3 * kLanes);
        a0 = hn::MulAdd(w0, x0, a0);
        a1 = hn::MulAdd(w0, x1, a1);
        a2 = hn::MulAdd(w0, x2, a2);
        a3 = hn::MulAdd(w0, x3, a3);
        b0 = hn::MulAdd(w1, x0, b0);
        b1 = hn::MulAdd(w1, x1, b1);
        b2 = hn::MulAdd(w1, x2, b2);
        b3 = hn::MulAdd(w1, x3, b3);
      }
      const auto put = [&](float* o, V s) HWY_ATTR { Store(add ? hn::Add(Load(o), s) : s, o); };
      put(o0 + j, a0);
      put(o0 + j + kLanes, a1);
      put(o0 + j + 2 * kLanes, a2);
      put(o0 + j + 3 * kLanes, a3);
      if (r + 1 < rows) {
        put(o1 + j, b0);
        put(o1 + j + kLanes, b1);
        put(o1 + j + 2 * kLanes, b2);
        put(o1 + j + 3 * kLanes, b3);
      }
    }
    for (; j < n; j += kLanes) {
      const int64_t w = std::min(kLanes, n - j);
      V a0 = Zero(), b0 = Zero();
      const T* x = v + j;
      for (int64_t i = 0; i < keys; ++i, x += ldv) {
        const V x0 = Load(x, w);
        a0 = hn::MulAdd(Set(p0[i]), x0, a0);
        b0 = hn::MulAdd(Set(p1[i]), x0, b0);
      }
      Store(add ? hn::Add(Load(o0 + j, w), a0) : a0, o0 + j, w);
      if (r + 1 < rows) Store(add ? hn::Add(Load(o1 + j, w), b0) : b0, o1 + j, w);
    }
  }
}

void SumValues(float* out, int64_t ldo, const float* p, int64_t ldp, const void* v, DType dtype, int64_t ldv,
               int64_t rows, int64_t keys, int64_t n, bool add) {
  if (dtype == DType::F32) {
    SumRows(out, ldo, p, ldp, static_cast<const float*>(v), ldv, rows, keys, n, add);
  } else {
    SumRows(out, ldo, p, ldp, static_cast<const BF16*>(v), ldv, rows, keys, n, add);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace viaduct::cpu {

HWY_EXPORT(SoftmaxBlock);
HWY_EXPORT(ScaleRows);
HWY_EXPORT(ProbabilitiesBlock);
HWY_EXPORT(ScoreGradientsBlock);
HWY_EXPORT(DotRow);
HWY_EXPORT(SumValues);

void softmaxBlock(float* scores, int64_t ld, int64_t rows, int64_t n, const Visible* visible, float scale,
                  float softcap, float* m, float* l, float* correction) {
  HWY_DYNAMIC_DISPATCH(SoftmaxBlock)(scores, ld, rows, n, visible, scale, softcap, m, l, correction);
}
void scaleRows(float* x, int64_t ld, int64_t rows, int64_t n, const float* factor) {
  HWY_DYNAMIC_DISPATCH(ScaleRows)(x, ld, rows, n, factor);
}
void probabilitiesBlock(float* scores, float* slope, int64_t ld, int64_t rows, int64_t n, const Visible* visible,
                        float scale, float softcap, const float* lse) {
  HWY_DYNAMIC_DISPATCH(ProbabilitiesBlock)(scores, slope, ld, rows, n, visible, scale, softcap, lse);
}
void scoreGradientsBlock(float* d, const float* p, const float* slope, int64_t ld, int64_t rows, int64_t n,
                         const Visible* visible, const float* delta) {
  HWY_DYNAMIC_DISPATCH(ScoreGradientsBlock)(d, p, slope, ld, rows, n, visible, delta);
}
float dotRow(const float* a, const float* b, int64_t n) { return HWY_DYNAMIC_DISPATCH(DotRow)(a, b, n); }
void sumValues(float* out, int64_t ldo, const float* p, int64_t ldp, const void* v, DType dtype, int64_t ldv,
               int64_t rows, int64_t keys, int64_t n, bool add) {
  HWY_DYNAMIC_DISPATCH(SumValues)(out, ldo, p, ldp, v, dtype, ldv, rows, keys, n, add);
}

}  // namespace viaduct::cpu
#endif  // HWY_ONCE
