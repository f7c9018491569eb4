// exp, the logistic function and the normal distribution on vectors of F32, to one or two units in the last place.
// Included once per instruction set.
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

// exp(x) = 2^k exp(r), k = round(x / ln 2), |r| <= ln(2) / 2, for -87.3 <= x <= 88.3. Adding 1.5 * 2^23 rounds to a
// whole number, which then stands in the lowest bits. ln 2 in two parts keeps r exact enough; the polynomial is a
// minimax fit of degree 6 with a relative error of 4e-9. NaN gives NaN.
HWY_INLINE V ExpInRange(V x) {
  const V magic = Set(12582912.0f);
  const V shifted = hn::MulAdd(x, Set(1.44269504f), magic);
  const V k = hn::Sub(shifted, magic);
  V r = hn::NegMulAdd(k, Set(0.693359375f), x);
  r = hn::NegMulAdd(k, Set(-2.12194440e-4f), r);
  const V rr = hn::Mul(r, r);  // Estrin's order: a shorter chain than Horner's
  const V low = hn::MulAdd(r, Set(1.66665211e-1f), Set(0.49999994f));
  const V high = hn::MulAdd(r, Set(8.36874545e-3f), Set(4.1668389e-2f));
  const V q = hn::MulAdd(rr, hn::MulAdd(rr, Set(1.38145394e-3f), high), low);
  const V p = hn::Add(hn::MulAdd(rr, q, r), Set(1.0f));
  const auto power = hn::ShiftLeft<23>(hn::BitCast(DI(), shifted));
  return hn::BitCast(DF(), hn::Add(hn::BitCast(DI(), p), power));
}

// On x86 the second operand of Min and Max wins when one is a NaN; on Arm the NaN does.
HWY_INLINE V Clamp(V x, float low, float high) { return hn::Max(Set(low), hn::Min(Set(high), x)); }

/// exp for x <= 88, 0 below -87, NaN for NaN: for the terms of a softmax.
HWY_INLINE V ExpBelow(V x) { return hn::IfThenZeroElse(hn::Lt(x, Set(-87.0f)), ExpInRange(hn::Max(Set(-87.0f), x))); }

// exp on [-ln(2) / 2, ln(2) / 2] to 1e-7, 1 at 0: fitted.
constexpr float kShort[6] = {
    1.0f, 9.999997020e-01f, 4.999915063e-01f, 1.666763574e-01f, 4.189793020e-02f, 8.290314116e-03f};
/// As ExpBelow in fewer steps: to 2e-7, and 1e-8 more for each doubling. For terms of BF16 logits.
HWY_INLINE V ShortExpBelow(V x) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  const V bounded = hn::Max(Set(-104.0f), x);
  const V k = hn::Round(hn::Mul(bounded, Set(1.44269504f)));
  const V r = hn::NegMulAdd(k, Set(0.69314718f), bounded);
  V p = hn::MulAdd(r, Set(kShort[5]), Set(kShort[4]));
  p = hn::MulAdd(p, r, Set(kShort[3]));
  p = hn::MulAdd(p, r, Set(kShort[2]));
  p = hn::MulAdd(p, r, Set(kShort[1]));
  p = hn::MulAdd(p, r, Set(kShort[0]));
  return V{_mm512_scalef_ps(p.raw, k.raw)};
#else
  return ExpBelow(x);
#endif
}

/// exp for any x: 0 below -87, infinity above 88, NaN for NaN.
HWY_INLINE V Exp(V x) {
  const V infinity = Set(__builtin_huge_valf());
  return hn::IfThenElse(hn::Gt(x, Set(88.0f)), infinity, ExpBelow(hn::Min(Set(88.0f), x)));
}

/// 1 / x for x from 1 to 1e38, to a unit or two in the last place.
HWY_INLINE V Reciprocal(V x) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  const V r = hn::ApproximateReciprocal(x);  // 14 bits
  return hn::MulAdd(r, hn::NegMulAdd(x, r, Set(1.0f)), r);
#else
  return hn::Div(Set(1.0f), x);
#endif
}

/// x / (1 + exp(-z)), where z is about a multiple of x and has its sign: x times the logistic function of z. Past -87
/// it is 0 to 1e-35.
HWY_INLINE V TimesLogistic(V x, V z) {
  return hn::Mul(hn::Max(Set(-1e3f), x), Reciprocal(hn::Add(Set(1.0f), ExpInRange(hn::Neg(Clamp(z, -87.0f, 87.0f))))));
}

/// s = 1 / (1 + exp(-x)) and 1 - s, both to a few units in the last place for |x| < 87, 0 and 1 to 1e-37 past it.
HWY_INLINE V Logistic(V x, V* rest) {
  const V e = ExpInRange(hn::Neg(Clamp(x, -87.0f, 87.0f)));
  const V s = Reciprocal(hn::Add(Set(1.0f), e));
  *rest = hn::Mul(e, s);
  return s;
}

/// The standard normal distribution: *cdf = P(X <= x), *pdf its density. With a = |x|: P(X > a) = exp(-a^2 / 2) R(a),
/// where R is a polynomial in (a - 3) / (a + 3), fitted on [0, 14] to a relative error of 8e-9: tails stay accurate
/// too.
HWY_INLINE void Normal(V x, V* cdf, V* pdf) {
  const V a = hn::Min(Set(13.1f), hn::Abs(x));  // -a^2 / 2 stays above -87
  const V square = hn::Mul(a, a);
  const V low = hn::MulSub(a, a, square);  // what the rounding of the square lost
  const V e = ExpInRange(hn::Mul(square, Set(-0.5f)));
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
  *cdf = hn::IfThenElse(hn::Lt(x, Zero()), upper, hn::Sub(Set(1.0f), upper));
  *pdf = hn::Mul(tail, Set(0.39894228f));
}

}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();
#endif  // per-target include guard
