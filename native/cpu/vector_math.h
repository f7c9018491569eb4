// exp, the logistic function and the normal distribution on vectors of F32, to one or two units in the last place. Included
// once per instruction set.
#include "vectors.h"

#if defined(VIADUCT_CPU_VECTOR_MATH_H) == defined(HWY_TARGET_TOGGLE)
#ifdef VIADUCT_CPU_VECTOR_MATH_H
#undef VIADUCT_CPU_VECTOR_MATH_H
#else
#define VIADUCT_CPU_VECTOR_MATH_H
#endif

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {

// exp(x) = 2^k exp(r), k = round(x / ln 2), |r| <= ln(2) / 2. ln 2 in two parts keeps r exact enough; the polynomial is a
// minimax fit of degree 6 with a relative error of 4e-9.
HWY_INLINE V ExpReduced(V x, V* k) {
  *k = hn::Round(hn::Mul(x, Set(1.44269504f)));
  V r = hn::NegMulAdd(*k, Set(0.693359375f), x);
  r = hn::NegMulAdd(*k, Set(-2.12194440e-4f), r);
  V p = Set(1.38145394e-3f);
  p = hn::MulAdd(p, r, Set(8.36874545e-3f));
  p = hn::MulAdd(p, r, Set(4.1668389e-2f));
  p = hn::MulAdd(p, r, Set(1.66665211e-1f));
  p = hn::MulAdd(p, r, Set(0.49999994f));
  p = hn::MulAdd(hn::Mul(r, r), p, r);
  return hn::Add(p, Set(1.0f));
}

HWY_INLINE V PowerOfTwo(hn::Vec<DI> k) { return hn::BitCast(DF(), hn::ShiftLeft<23>(hn::Add(k, hn::Set(DI(), 127)))); }

/// exp for any x: 0 and infinity past the ends, subnormals between, NaN for NaN.
HWY_INLINE V Exp(V x) {
  // The second operand wins on x86 when one is a NaN.
  const V bounded = hn::Max(Set(-110.0f), hn::Min(Set(100.0f), x));
  V k;
  const V p = ExpReduced(bounded, &k);
  const auto whole = hn::ConvertTo(DI(), k);
  const auto half = hn::ShiftRight<1>(whole);
  return hn::Mul(hn::Mul(p, PowerOfTwo(half)), PowerOfTwo(hn::Sub(whole, half)));
}

/// exp for x <= 88, 0 below -87, NaN for NaN: for the terms of a softmax.
HWY_INLINE V ExpBelow(V x) {
  V k;
  const V p = ExpReduced(hn::Max(Set(-87.0f), x), &k);
  return hn::IfThenZeroElse(hn::Lt(x, Set(-87.0f)), hn::Mul(p, PowerOfTwo(hn::ConvertTo(DI(), k))));
}

/// 1 / (1 + exp(-x)).
HWY_INLINE V Logistic(V x) { return hn::Div(Set(1.0f), hn::Add(Set(1.0f), Exp(hn::Neg(x)))); }

/// s = 1 / (1 + exp(-x)) and 1 - s, both to a few units in the last place for x > -80.
HWY_INLINE V Logistic(V x, V* rest) {
  const V e = Exp(hn::Min(Set(80.0f), hn::Neg(x)));
  const V s = hn::Div(Set(1.0f), hn::Add(Set(1.0f), e));
  *rest = hn::Mul(e, s);
  return s;
}

/// The standard normal distribution: *cdf = P(X <= x), *pdf its density. With a = |x|: P(X > a) = exp(-a^2 / 2) R(a), where
/// R is a polynomial in (a - 3) / (a + 3), fitted on [0, 14] to a relative error of 8e-9: tails stay accurate too.
HWY_INLINE void Normal(V x, V* cdf, V* pdf) {
  const V a = hn::Min(hn::Abs(x), Set(16.0f));
  const V square = hn::Mul(a, a);
  const V low = hn::MulSub(a, a, square);  // what the rounding of the square lost
  const V e = Exp(hn::Mul(square, Set(-0.5f)));
  const V tail = hn::NegMulAdd(e, hn::Mul(low, Set(0.5f)), e);
  const V s = hn::Div(hn::Sub(a, Set(3.0f)), hn::Add(a, Set(3.0f)));
  V p = Set(5.3672069043386728e-05f);
  p = hn::MulAdd(p, s, Set(1.1554393859114498e-04f));
  p = hn::MulAdd(p, s, Set(-3.3948518102988601e-04f));
  p = hn::MulAdd(p, s, Set(-9.8375859670341015e-04f));
  p = hn::MulAdd(p, s, Set(2.9045562259852886e-03f));
  p = hn::MulAdd(p, s, Set(6.1320709064602852e-03f));
  p = hn::MulAdd(p, s, Set(-4.6213291585445404e-02f));
  p = hn::MulAdd(p, s, Set(1.2322503328323364e-01f));
  p = hn::MulAdd(p, s, Set(-2.0640261471271515e-01f));
  p = hn::MulAdd(p, s, Set(1.2151394784450531e-01f));
  const V upper = hn::Mul(tail, p);
  const V value = hn::IfThenElse(hn::Lt(x, Zero()), upper, hn::Sub(Set(1.0f), upper));
  *cdf = hn::IfThenElse(hn::IsNaN(x), x, value);
  *pdf = hn::Mul(tail, Set(0.39894228f));
}

}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();
#endif  // per-target include guard
