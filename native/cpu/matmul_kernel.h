// One-thread matmul kernels behind Highway's run-time dispatch: packing, the register tile, rows against weights. Nothing
// here knows tensors, streams or threads. Matrices are given as (pointer, dtype, two strides); one stride is 1.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../tensor.h"

namespace viaduct::cpu {

/// A logical [rows, cols] view of F32, BF16 or F16 elements; rowStride or colStride is 1.
struct MatrixView {
  const void* data = nullptr;
  DType dtype = DType::F32;
  int64_t rowStride = 0;
  int64_t colStride = 1;

  MatrixView at(int64_t row, int64_t col) const {
    MatrixView v = *this;
    v.data =
        static_cast<const char*>(data) + (row * rowStride + col * colStride) * static_cast<int64_t>(dtypeBytes(dtype));
    return v;
  }
  MatrixView transposed() const { return {data, dtype, colStride, rowStride}; }
};

/// Shape of the register tile of the chosen instruction set: c[mr, nr] += a[mr, k] b[k, nr].
struct TileShape {
  int64_t mr = 0;
  int64_t nr = 0;
};
TileShape registerTile();
/// "AVX2", "AVX3", "NEON", ...
const char* simdTarget();

constexpr int64_t roundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/// a[m, k] -> strips of mr rows, each [k][mr] in F32; rows past m are 0. dst holds roundUp(m, mr) * k floats.
void packRows(float* dst, const MatrixView& a, int64_t m, int64_t k);
/// b[k, n] -> strips of nr columns, each [k][nr] in F32; columns past n are 0. dst holds roundUp(n, nr) * k floats.
void packCols(float* dst, const MatrixView& b, int64_t k, int64_t n);
/// c[m, n] = (add ? c : 0) + a b (+ bias[n]) on packed strips; c F32 with ldc elements between rows. Strips of b may be
/// deeper than k: bDepth rows lie in each, 0 means k.
void multiplyPacked(float* c, int64_t ldc, const float* a, const float* b, int64_t m, int64_t n, int64_t k, bool add,
                    const float* bias = nullptr, int64_t bDepth = 0);

/// c[m, n] = (add ? c : 0) + a b (+ bias[n]), packing as it goes. Sums over k run in fixed chunks: an element's value
/// depends on its row, its column and k alone, not on the tile that it stands in.
void multiplyTile(float* c, int64_t ldc, const MatrixView& a, const MatrixView& b, int64_t m, int64_t n, int64_t k,
                  bool add, const float* bias);

/// Brings a row x[k] into the order in which multiplyFewRows meets weights of this dtype. F32: as it is.
void orderForWeights(float* x, int64_t k, DType weights);
/// c[m, n] = (add ? c : 0) + x b (+ bias[n]) for few rows x[m, k] (F32, ldx between rows, orderForWeights) against weights b[k, n] that are
/// contiguous along k: nothing is packed, each weight is read once. Sums run in lanes along k.
void multiplyFewRows(float* c, int64_t ldc, const float* x, int64_t ldx, const MatrixView& b, int64_t m, int64_t n,
                     int64_t k, bool add, const float* bias);

/// Grow-only aligned memory of the calling thread, reused by all kernels; `which` separates users that nest.
float* threadScratch(int which, int64_t floats);
enum Scratch { kPackA, kPackB, kTileC, kOperation, kAttention, kScratchCount };

}  // namespace viaduct::cpu
