// Vector loads, stores and reductions over F32 and BF16 memory, computing in F32. Included once per instruction set by
// the files that name themselves in HWY_TARGET_INCLUDE. A tail goes through a full vector as well, so that an element's
// result does not depend on its place.
#include "simd.h"
// simd.h comes before Highway
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../half.h"
#include "../tensor.h"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "parallel.h"

#if defined(VIADUCT_CPU_VECTORS_H) == defined(HWY_TARGET_TOGGLE)
#ifdef VIADUCT_CPU_VECTORS_H
#undef VIADUCT_CPU_VECTORS_H
#else
#define VIADUCT_CPU_VECTORS_H
#endif

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DI = hn::RebindToSigned<DF>;
using DU = hn::RebindToUnsigned<DF>;
using DH = hn::Rebind<uint16_t, DF>;
using V = hn::Vec<DF>;
constexpr int64_t kLanes = static_cast<int64_t>(hn::MaxLanes(DF()));

HWY_INLINE V Set(float x) { return hn::Set(DF(), x); }
HWY_INLINE V Zero() { return hn::Zero(DF()); }

HWY_INLINE V Load(const float* p) { return hn::LoadU(DF(), p); }
HWY_INLINE V Load(const BF16* p) {
  const auto half = hn::LoadU(DH(), reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(DF(), hn::ShiftLeft<16>(hn::PromoteTo(DU(), half)));
}

/// Round to nearest even at bit 16; a NaN becomes 0x7FC0. The BF16 stands in the upper half of each lane, anything in
/// the lower.
HWY_INLINE hn::Vec<DU> RoundedBits(V v) {
  const DU du;
  const auto bits = hn::BitCast(du, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1));
  const auto rounded = hn::Add(hn::Add(bits, hn::Set(du, 0x7fff)), odd);
  return hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), hn::Set(du, 0x7fc00000), rounded);
}
/// The BF16 in the lower half of each lane, the upper is 0.
HWY_INLINE hn::Vec<DU> NarrowBits(V v) { return hn::ShiftRight<16>(RoundedBits(v)); }

HWY_INLINE void Store(V v, float* p) { hn::StoreU(v, DF(), p); }
HWY_INLINE void Store(V v, BF16* p) {
#if HWY_ARCH_X86 && \
    HWY_TARGET == HWY_AVX2  // fewer steps than the general form, which packs within 128 bits and permutes
  const __m256i wide = NarrowBits(v).raw;
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
#else
  hn::StoreU(hn::DemoteTo(DH(), hn::BitCast(DI(), NarrowBits(v))), DH(), reinterpret_cast<uint16_t*>(p));
#endif
}

/// The first n lanes; the others are 0.
template <typename T>
HWY_INLINE V Load(const T* p, int64_t n) {
  if (HWY_LIKELY(n >= kLanes)) return Load(p);
  alignas(64) T buffer[kLanes] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return Load(buffer);
}
template <typename T>
HWY_INLINE void Store(V v, T* p, int64_t n) {
  if (HWY_LIKELY(n >= kLanes)) return Store(v, p);
  alignas(64) T buffer[kLanes];
  Store(v, buffer);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

/// v as it would come back from memory of type T.
template <typename T>
HWY_INLINE V RoundTo(V v);
template <>
HWY_INLINE V RoundTo<float>(V v) {
  return v;
}
template <>
HWY_INLINE V RoundTo<BF16>(V v) {
  return hn::BitCast(DF(), hn::And(RoundedBits(v), hn::Set(DU(), 0xFFFF0000u)));
}

using DD = hn::Repartition<double, DF>;
using VD = hn::Vec<DD>;
HWY_INLINE VD LowerF64(V v) { return hn::PromoteTo(DD(), hn::LowerHalf(hn::Half<DF>(), v)); }
HWY_INLINE VD UpperF64(V v) { return hn::PromoteTo(DD(), hn::UpperHalf(hn::Half<DF>(), v)); }

/// Sum of the lanes in F64.
HWY_INLINE double SumLanes(V v) { return hn::GetLane(hn::SumOfLanes(DD(), hn::Add(LowerF64(v), UpperF64(v)))); }

/// Sum of the F64 lanes, in lane order.
HWY_INLINE double SumF64Lanes(VD v) {
  constexpr size_t kDoubles = hn::MaxLanes(DD());
  alignas(64) double lanes[kDoubles];
  hn::Store(v, DD(), lanes);
  double sum = 0;
  for (size_t i = 0; i < kDoubles; ++i) sum += lanes[i];
  return sum;
}

/// Sum of f(i, n) over the vectors [i, i + n) of [0, n): four accumulators, F32 lanes. f returns 0 in lanes past n.
template <typename F>
HWY_INLINE double SumVectors(int64_t n, F&& f) {
  V s0 = Zero(), s1 = Zero(), s2 = Zero(), s3 = Zero();
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    s0 = hn::Add(s0, f(i, kLanes));
    s1 = hn::Add(s1, f(i + kLanes, kLanes));
    s2 = hn::Add(s2, f(i + 2 * kLanes, kLanes));
    s3 = hn::Add(s3, f(i + 3 * kLanes, kLanes));
  }
  for (; i < n; i += kLanes) s0 = hn::Add(s0, f(i, std::min(kLanes, n - i)));
  return SumLanes(hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)));
}

/// f(i, n) for the vectors [i, i + n) of [0, n).
template <typename F>
HWY_INLINE void ForVectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, n - i);
}

}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();
#endif  // per-target include guard
