// Products of bfloat16 two by two, on CPUs whose instruction adds two products to a float (AVX512_BF16). A word is two neighbours along the
// dimension that is summed: packed words lie as packed floats of matmul_kernel.h do, with half of the depth. Nothing here knows
// tensors or threads.
#pragma once

#include <cstdint>

#include "matmul_kernel.h"

namespace viaduct::cpu {

/// Whether this CPU has it, and packed floats have the shape of packed words.
bool multipliesPairs();

constexpr int64_t words(int64_t depth) { return (depth + 1) / 2; }

/// Rows src[p * lds + 0..n), p < depth, of bfloat16 to strips of `width` columns: word p of column j is rows 2p and 2p + 1 there.
/// width: that of rows or of columns of registerTile(). Behind an odd depth and behind n stands 0.
void packPairsAlong(float* dst, const uint16_t* src, int64_t lds, int64_t n, int64_t width, int64_t depth);
/// c[m, n] = (add ? c : 0) + a b over packed words; arguments as of multiplyPacked, depths in words.
void multiplyPairs(float* c, int64_t ldc, const float* a, const float* b, int64_t m, int64_t n, int64_t depth, bool add,
                   int64_t bDepth);
/// Whether multiplyPairsOf takes them: bfloat16, and what is contiguous along k begins each row with a whole word.
bool inPairs(const MatrixView& a, const MatrixView& b, int64_t k);
/// multiplyTile of bfloat16, packing as it goes: an element's value depends on its row, its column and k alone.
void multiplyPairsOf(float* c, int64_t ldc, const MatrixView& a, const MatrixView& b, int64_t m, int64_t n, int64_t k,
                     bool add);
/// c[m, n] = (add ? c : 0) + x w (+ bias[n]) for few rows x[m, k] against weights w[n, k], both of bfloat16 with k contiguous: each weight
/// is read once. Sums run in lanes along k.
void multiplyFewPairs(float* c, int64_t ldc, const uint16_t* x, int64_t ldx, const uint16_t* w, int64_t ldw, int64_t m,
                      int64_t n, int64_t k, bool add, const float* bias);
/// n floats, a multiple of 16, to bfloat16.
void narrowRow(uint16_t* dst, const float* src, int64_t n);

}  // namespace viaduct::cpu
