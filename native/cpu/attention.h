// What attention's forward and backward share: how queries are gathered into rows. Row (i, r) of a block is query i, head r of
// the group: R heads share one load of keys and values.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../attention_args.h"
#include "attention_kernel.h"
#include "cast.h"
#include "matmul_kernel.h"

namespace viaduct::cpu {

/// Keys in a block; blocks begin at multiples of it, so that the order of sums depends on the shape alone.
constexpr int64_t kKeyBlock = 128;

/// Queries of a block, so that queries x heads of the group are about `rows`.
inline int64_t queryBlock(const AttentionArgs& a, int64_t rows) {
  return std::max<int64_t>(1, std::min(a.S, rows / std::max<int64_t>(1, a.R)));
}

/// rows[(i - begin) * R + r, 0..n) = x[b, i, g, r, :] * scale as F32, for queries [begin, end).
inline void gatherRows(float* rows, const AttentionArgs& a, const HeadsView& x, int64_t b, int64_t g, int64_t begin,
                       int64_t end, int64_t n, float scale) {
  const CastRow widen = castRow(DType::F32, x.dtype);
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t r = 0; r < a.R; ++r, rows += n) {
      widen(rows, 1, x.at(b, i, g, r), 1, n);
      if (scale != 1.0f) {
        for (int64_t j = 0; j < n; ++j) rows[j] *= scale;
      }
    }
  }
}

/// Visible columns of the rows of queries [begin, end) in the key block [from, to). Returns whether any row sees any.
inline bool visibleRows(Visible* see, const AttentionArgs& a, int64_t b, int64_t begin, int64_t end, int64_t from,
                        int64_t to) {
  bool any = false;
  for (int64_t i = begin; i < end; ++i) {
    Visible v = a.visible(b, i);
    v.lo = std::max(v.lo, from) - from;
    v.hi = std::min(v.hi, to) - from;
    if (v.lo >= v.hi) v.lo = v.hi = 0;
    any = any || v.lo < v.hi;
    for (int64_t r = 0; r < a.R; ++r) *see++ = v;
  }
  return any;
}

/// Smallest lo and largest hi over queries [begin, end).
inline Visible visibleSpan(const AttentionArgs& a, int64_t b, int64_t begin, int64_t end) {
  Visible span{a.K, 0};
  for (int64_t i = begin; i < end; ++i) {
    const Visible v = a.visible(b, i);
    if (v.lo >= v.hi) continue;
    span.lo = std::min(span.lo, v.lo);
    span.hi = std::max(span.hi, v.hi);
  }
  return span;
}

/// Rows are multiplied in groups (a multiple of every register tile's height): each takes the keys that it sees, so that half
/// of a block on the causal diagonal is skipped.
constexpr int64_t kGroup = 48;

/// Smallest lo and largest hi of rows [begin, end) of a block; {0, 0} when they see nothing.
inline Visible groupSpan(const Visible* see, int64_t begin, int64_t end) {
  Visible span{INT64_MAX, 0};
  for (int64_t row = begin; row < end; ++row) {
    if (see[row].lo >= see[row].hi) continue;
    span.lo = std::min(span.lo, see[row].lo);
    span.hi = std::max(span.hi, see[row].hi);
  }
  return span.hi > 0 ? span : Visible{};
}

void runAttentionForward(const AttentionArgs& a);
void runAttentionBackward(const AttentionArgs& a);

}  // namespace viaduct::cpu
