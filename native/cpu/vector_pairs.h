// Two vectors of neighbours at a time, in the order that costs the least for elements of type T: F32 one behind the other, BF16 as even and
// odd ones, which come apart and together without moving between lanes. Included once per instruction set.
#include "vectors.h"
// vectors.h comes before other parts of Highway
#include "hwy/cache_control.h"

#if defined(VIADUCT_CPU_VECTOR_PAIRS_H) == defined(HWY_TARGET_TOGGLE)
#ifdef VIADUCT_CPU_VECTOR_PAIRS_H
#undef VIADUCT_CPU_VECTOR_PAIRS_H
#else
#define VIADUCT_CPU_VECTOR_PAIRS_H
#endif

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {

struct Pair {
  V a, b;
};
constexpr int64_t kPair = 2 * kLanes;
using DW = hn::Repartition<uint16_t, DF>;

HWY_INLINE Pair ReadPair(const float* p) { return {Load(p), Load(p + kLanes)}; }
HWY_INLINE Pair ReadPair(const BF16* p) {
  const auto both = hn::BitCast(DU(), hn::LoadU(DW(), reinterpret_cast<const uint16_t*>(p)));
  return {hn::BitCast(DF(), hn::ShiftLeft<16>(both)), hn::BitCast(DF(), hn::And(both, hn::Set(DU(), 0xFFFF0000u)))};
}
HWY_INLINE void WritePair(Pair v, float* p) {
  Store(v.a, p);
  Store(v.b, p + kLanes);
}
HWY_INLINE void WritePair(Pair v, BF16* p) {
  const auto even = hn::BitCast(DW(), hn::ShiftRight<16>(RoundedBits(v.a)));
  const auto odd = hn::BitCast(DW(), RoundedBits(v.b));
  hn::StoreU(hn::OddEven(odd, even), DW(), reinterpret_cast<uint16_t*>(p));
}

/// The first n of a pair's elements; the others are 0.
template <typename T>
HWY_INLINE Pair LoadPair(const T* p, int64_t n) {
  if (HWY_LIKELY(n >= kPair)) return ReadPair(p);
  alignas(64) T buffer[kPair] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return ReadPair(buffer);
}
template <typename T>
HWY_INLINE void StorePair(Pair v, T* p, int64_t n) {
  if (HWY_LIKELY(n >= kPair)) return WritePair(v, p);
  alignas(64) T buffer[kPair];
  WritePair(v, buffer);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

/// A pair of elements of type S in the order of those of type T.
template <typename T, typename S>
HWY_INLINE Pair LoadPairFor(const S* p, int64_t n) {
  const Pair v = LoadPair(p, n);
  if constexpr (std::is_same_v<T, BF16> && std::is_same_v<S, float>)
    return {hn::ConcatEven(DF(), v.b, v.a), hn::ConcatOdd(DF(), v.b, v.a)};
  else
    return v;
}

/// Begins to fetch a pair; anything may stand there, also no memory.
template <typename T>
HWY_INLINE void PrefetchPair(const T* p) {
  for (int64_t i = 0; i < kPair; i += 64 / static_cast<int64_t>(sizeof(T))) hwy::Prefetch(p + i);
}

/// f of both halves.
template <typename F, typename... Pairs>
HWY_INLINE Pair Each(F&& f, Pairs... pairs) {
  return {f(pairs.a...), f(pairs.b...)};
}

/// f(i, n) for the pairs [i, i + n) of [0, n).
template <typename F>
HWY_INLINE void ForPairs(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) f(i, kPair);
  if (i < n) f(i, n - i);
}

/// Sum of f(i, n), a pair that is 0 past n, over the pairs [i, i + n) of [0, n): four accumulators, F32 lanes.
template <typename F>
HWY_INLINE double SumPairs(int64_t n, F&& f) {
  const auto add = [](V x, V y) HWY_ATTR { return hn::Add(x, y); };
  Pair s{Zero(), Zero()}, t{Zero(), Zero()};
  int64_t i = 0;
  for (; i + 2 * kPair <= n; i += 2 * kPair) {
    s = Each(add, s, f(i, kPair));
    t = Each(add, t, f(i + kPair, kPair));
  }
  for (; i < n; i += kPair) s = Each(add, s, f(i, std::min(kPair, n - i)));
  return SumLanes(hn::Add(hn::Add(s.a, s.b), hn::Add(t.a, t.b)));
}

/// The first n of a pair of type T, 0 past them.
template <typename T>
HWY_INLINE Pair KeepFirst(Pair v, int64_t n) {
  if (HWY_LIKELY(n >= kPair)) return v;
  alignas(64) float kept[kPair] = {};
  std::fill(kept, kept + n, 1.0f);
  const Pair ones = LoadPairFor<T>(kept, kPair);
  return Each([](V x, V one) HWY_ATTR { return hn::IfThenElseZero(hn::Ne(one, Zero()), x); }, v, ones);
}

}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();
#endif  // per-target include guard
