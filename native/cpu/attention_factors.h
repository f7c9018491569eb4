// What attention's products of blocks are made of: floats, or bfloat16 two by two (pair_kernel.h). The one place that knows how either is
// gathered, packed and multiplied; forward and backward are written once, over these.
#pragma once

#include <algorithm>
#include <cstring>

#include "attention.h"
#include "pair_kernel.h"

namespace viaduct::cpu {

/// Any dtypes, as F32. Queries are scaled when they are gathered.
struct WideFactors {
  using Element = float;
  static constexpr int64_t kElementsAFloat = 1;
  static float scoreScale(const AttentionArgs&) { return 1.0f; }
  static int64_t depth(int64_t n) { return n; }
  static int64_t begin(int64_t at) { return at; }

  /// rows[(i - begin) * R + r, 0..n) = x[b, i, g, r, :] (* scale), for queries [begin, end).
  static void gather(float* rows, const AttentionArgs& a, const HeadsView& x, int64_t b, int64_t g, int64_t begin,
                     int64_t end, int64_t n, float scale) {
    gatherRows(rows, a, x, b, g, begin, end, n, scale);
  }
  /// x[m, depth] as rows of a product.
  static void rows(float* dst, const float* x, int64_t ld, int64_t m, int64_t depth) {
    packRows(dst, {x, DType::F32, ld, 1}, m, depth);
  }
  /// x[depth, m], transposed, as rows of a product.
  static void rowsAlong(float* dst, const float* x, int64_t ld, int64_t m, int64_t depth) {
    packRows(dst, {x, DType::F32, 1, ld}, m, depth);
  }
  /// x[depth, n] as columns of a product.
  static void columns(float* dst, const void* x, DType dtype, int64_t ld, int64_t depth, int64_t n) {
    packCols(dst, {x, dtype, ld, 1}, depth, n);
  }
  /// x[n, depth], transposed, as columns of a product.
  static void columnsAcross(float* dst, const void* x, DType dtype, int64_t ld, int64_t depth, int64_t n) {
    packCols(dst, {x, dtype, 1, ld}, depth, n);
  }
  /// A block of F32 [rows, n], ld apart, as elements; `to` is memory for as many.
  static const float* narrow(const float* x, float*, int64_t, int64_t, int64_t) { return x; }
  static void multiply(float* c, int64_t ldc, const float* a, const float* b, int64_t m, int64_t n, int64_t depth,
                       bool add, int64_t bDepth) {
    multiplyPacked(c, ldc, a, b, m, n, depth, add, nullptr, bDepth);
  }
};

/// BF16 alone; what is computed in between (probabilities, gradients of scores) is rounded to it. Scores are scaled.
struct PairFactors {
  using Element = uint16_t;
  static constexpr int64_t kElementsAFloat = 2;
  static float scoreScale(const AttentionArgs& a) { return a.scale; }
  static int64_t depth(int64_t n) { return words(n); }
  static int64_t begin(int64_t at) { return at / 2 * 2; }

  /// Channels in pairs, from row to row too.
  static bool take(const AttentionArgs& a, bool backward) {
    const auto even = [&](const HeadsView& x) { return x.dtype == DType::BF16 && x.position % 2 == 0; };
    return multipliesPairs() && even(a.q) && even(a.k) && even(a.v) && (!backward || even(a.dOut)) && a.D % 2 == 0 &&
           a.Dv % 2 == 0 && a.scale > 0;
  }

  static void gather(uint16_t* rows, const AttentionArgs& a, const HeadsView& x, int64_t b, int64_t g, int64_t begin,
                     int64_t end, int64_t n, float) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t r = 0; r < a.R; ++r, rows += n) std::memcpy(rows, x.at(b, i, g, r), static_cast<size_t>(n) * 2);
    }
  }
  static void rows(float* dst, const uint16_t* x, int64_t ld, int64_t m, int64_t depth) {
    packRows(dst, {x, DType::F32, ld / 2, 1}, m, words(depth));
  }
  static void rowsAlong(float* dst, const uint16_t* x, int64_t ld, int64_t m, int64_t depth) {
    packPairsAlong(dst, x, ld, m, registerTile().mr, depth);
  }
  static void columns(float* dst, const void* x, DType, int64_t ld, int64_t depth, int64_t n) {
    packPairsAlong(dst, static_cast<const uint16_t*>(x), ld, n, registerTile().nr, depth);
  }
  static void columnsAcross(float* dst, const void* x, DType, int64_t ld, int64_t depth, int64_t n) {
    packCols(dst, {x, DType::F32, 1, ld / 2}, words(depth), n);
  }
  static const uint16_t* narrow(const float* x, uint16_t* to, int64_t rows, int64_t n, int64_t ld) {
    for (int64_t row = 0; row < rows; ++row) narrowRow(to + row * ld, x + row * ld, roundUp(n, 16));
    return to;
  }
  static void multiply(float* c, int64_t ldc, const float* a, const float* b, int64_t m, int64_t n, int64_t depth,
                       bool add, int64_t bDepth) {
    multiplyPairs(c, ldc, a, b, m, n, depth, add, bDepth);
  }
};

/// scores[rows, :] = a b for what is seen; a packed by rows, b by keys, both over `channels`.
template <typename F>
void multiplySeen(float* scores, int64_t ld, const float* a, const float* b, int64_t rows, int64_t channels,
                  const Visible* see) {
  const int64_t nr = registerTile().nr, depth = F::depth(channels);
  for (int64_t begin = 0; begin < rows; begin += kGroup) {
    const int64_t end = std::min(begin + kGroup, rows);
    const Visible span = groupSpan(see, begin, end);
    if (span.hi == 0) continue;
    const int64_t from = span.lo / nr * nr;
    F::multiply(scores + begin * ld + from, ld, a + begin * depth, b + from * depth, end - begin, span.hi - from, depth,
                false, depth);
  }
}

/// y[rows, width] += p v: p[rows, keys] with ld between rows, 0 where unseen; v packed by columns over `keys` rows.
template <typename F>
void addSeen(float* y, int64_t width, const typename F::Element* p, int64_t ld, const float* v, int64_t keys,
             int64_t rows, const Visible* see, float* packed) {
  const int64_t nr = registerTile().nr;
  for (int64_t begin = 0; begin < rows; begin += kGroup) {
    const int64_t end = std::min(begin + kGroup, rows);
    const Visible span = groupSpan(see, begin, end);
    if (span.hi == 0) continue;
    const int64_t from = F::begin(span.lo), seen = span.hi - from;
    F::rows(packed, p + begin * ld + from, ld, end - begin, seen);
    F::multiply(y + begin * width, width, packed, v + F::depth(from) * nr, end - begin, width, F::depth(seen), true,
                F::depth(keys));
  }
}

/// y[keys, width] += p' x: p[rows, keys], 0 where unseen; x packed by columns over `rows` rows. Keys in groups, each takes the
/// rows that see it.
template <typename F>
void addSeenBy(float* y, int64_t width, const typename F::Element* p, int64_t ld, const float* x, int64_t rows,
               int64_t keys, const Visible* see, float* packed) {
  const int64_t nr = registerTile().nr;
  for (int64_t from = 0; from < keys; from += kGroup) {
    const int64_t to = std::min(from + kGroup, keys);
    const auto sees = [&](int64_t row) { return see[row].lo < to && see[row].hi > from; };
    int64_t first = 0, end = rows;
    while (first < end && !sees(first)) ++first;
    while (first < end && !sees(end - 1)) --end;
    if (first == end) continue;
    const int64_t begin = F::begin(first);
    F::rowsAlong(packed, p + begin * ld + from, ld, to - from, end - begin);
    F::multiply(y + from * width, width, packed, x + F::depth(begin) * nr, to - from, width, F::depth(end - begin),
                true, F::depth(rows));
  }
}

}  // namespace viaduct::cpu
