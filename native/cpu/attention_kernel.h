// Row kernels of attention behind run-time dispatch: softmax over a block of scores, its gradient, sums of value rows. A row
// of scores sees the columns [lo, hi), relative to its block, and nothing else. All in F32, one thread, no tensors.
#pragma once

#include <cstdint>

#include "../attention_args.h"

namespace viaduct::cpu {

/// scores[rows, n] (ld apart), times scale, become exp(score - m), 0 where unseen. m and l are the running maximum and sum of each row;
/// correction[row] is what earlier sums and outputs must be multiplied with. softcap 0: none.
void softmaxBlock(float* scores, int64_t ld, int64_t rows, int64_t n, const Visible* visible, float scale,
                  float softcap, float* m, float* l, float* correction);
/// x[row, 0..n) *= factor[row].
void scaleRows(float* x, int64_t ld, int64_t rows, int64_t n, const float* factor);
/// scores, times scale, become p = exp(score - lse[row]), 0 where unseen; with a softcap, slope receives d(capped score)/d(scaled score).
void probabilitiesBlock(float* scores, float* slope, int64_t ld, int64_t rows, int64_t n, const Visible* visible,
                        float scale, float softcap, const float* lse);
/// d[row, :] = p * (d - delta[row]) (* slope, unless null), 0 where unseen. p is 0 there.
void scoreGradientsBlock(float* d, const float* p, const float* slope, int64_t ld, int64_t rows, int64_t n,
                         const Visible* visible, const float* delta);
/// Sum of a[i] * b[i].
float dotRow(const float* a, const float* b, int64_t n);
/// out[rows, n] = (add ? out : 0) + p[rows, keys] v[keys, n]; v F32 or BF16 with ldv elements between rows.
void sumValues(float* out, int64_t ldo, const float* p, int64_t ldp, const void* v, DType dtype, int64_t ldv,
               int64_t rows, int64_t keys, int64_t n, bool add);

}  // namespace viaduct::cpu
