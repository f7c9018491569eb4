// Products of bfloat16 two by two; see pair_kernel.h. Intrinsics, because Highway 1.0 has no such instruction.
#include "pair_kernel.h"

#include "matmul_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace viaduct::cpu {

#if defined(__x86_64__)

namespace {

#define VIADUCT_PAIRS __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

constexpr int64_t kRows = 12, kColumns = 32, kLanes = 16;

#define VIADUCT_ROWS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

/// c[12, 32] = (add ? c : 0) + a b.
VIADUCT_PAIRS inline void registerTileOfPairs(float* c, int64_t ldc, const float* a, const float* b, int64_t depth,
                                              bool add) {
#define X(i)                            \
  __m512 s##i##0 = _mm512_setzero_ps(); \
  __m512 s##i##1 = _mm512_setzero_ps();
  VIADUCT_ROWS(X)
#undef X
  for (int64_t p = 0; p < depth; ++p, a += kRows, b += kColumns) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_ps(b);
    const __m512bh b1 = (__m512bh)_mm512_loadu_ps(b + kLanes);
#define X(i)                                           \
  {                                                    \
    const __m512bh w = (__m512bh)_mm512_set1_ps(a[i]); \
    s##i##0 = _mm512_dpbf16_ps(s##i##0, w, b0);        \
    s##i##1 = _mm512_dpbf16_ps(s##i##1, w, b1);        \
  }
    VIADUCT_ROWS(X)
#undef X
  }
#define X(i)                                                         \
  {                                                                  \
    float* o = c + i * ldc;                                          \
    if (add) {                                                       \
      s##i##0 = _mm512_add_ps(_mm512_loadu_ps(o), s##i##0);          \
      s##i##1 = _mm512_add_ps(_mm512_loadu_ps(o + kLanes), s##i##1); \
    }                                                                \
    _mm512_storeu_ps(o, s##i##0);                                    \
    _mm512_storeu_ps(o + kLanes, s##i##1);                           \
  }
  VIADUCT_ROWS(X)
#undef X
}

VIADUCT_PAIRS void multiply(float* c, int64_t ldc, const float* a, const float* b, int64_t m, int64_t n, int64_t depth,
                            bool add, int64_t bDepth) {
  alignas(64) float edge[kRows * kColumns];
  for (int64_t j = 0; j < n; j += kColumns) {
    for (int64_t i = 0; i < m; i += kRows) {
      float* o = c + i * ldc + j;
      const int64_t rows = m - i < kRows ? m - i : kRows, columns = n - j < kColumns ? n - j : kColumns;
      if (rows == kRows && columns == kColumns) {
        registerTileOfPairs(o, ldc, a + i * depth, b + j * bDepth, depth, add);
        continue;
      }
      registerTileOfPairs(edge, kColumns, a + i * depth, b + j * bDepth, depth, false);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t w = 0; w < columns; ++w) {
          o[r * ldc + w] = (add ? o[r * ldc + w] : 0.0f) + edge[r * kColumns + w];
        }
      }
    }
  }
}

/// Words of 16 columns of two rows.
VIADUCT_PAIRS inline __m512i wordsOf(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_maskz_cvtepu16_epi32(0xffff, even),
                         _mm512_slli_epi32(_mm512_maskz_cvtepu16_epi32(0xffff, odd), 16));
}

VIADUCT_PAIRS void packAlong(float* dst, const uint16_t* src, int64_t lds, int64_t n, int64_t width, int64_t depth) {
  const int64_t length = words(depth);
  for (int64_t p = 0; p < length; ++p) {
    const uint16_t* even = src + 2 * p * lds;
    const uint16_t* odd = 2 * p + 1 < depth ? even + lds : nullptr;
    for (int64_t j = 0; j < n; j += width) {
      float* o = dst + j * length + p * width;
      for (int64_t w = 0; w < width; w += kLanes) {
        const int64_t stored = width - w < kLanes ? width - w : kLanes;
        const int64_t left = n - j - w, here = left < 0 ? 0 : left < stored ? left : stored;
        const auto read = static_cast<__mmask16>((1u << here) - 1), write = static_cast<__mmask16>((1u << stored) - 1);
        const __m256i first = _mm256_maskz_loadu_epi16(read, even + j + w);
        const __m256i second = odd == nullptr ? _mm256_setzero_si256() : _mm256_maskz_loadu_epi16(read, odd + j + w);
        _mm512_mask_storeu_epi32(o + w, write, wordsOf(first, second));
      }
    }
  }
}

VIADUCT_PAIRS void narrow(uint16_t* dst, const float* src, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(src + i)));
  }
}

}  // namespace

bool multipliesPairs() {
  static const bool has = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && registerTile().mr == kRows &&
                          registerTile().nr == kColumns;
  return has;
}

void packPairsAlong(float* dst, const uint16_t* src, int64_t lds, int64_t n, int64_t width, int64_t depth) {
  packAlong(dst, src, lds, n, width, depth);
}
void multiplyPairs(float* c, int64_t ldc, const float* a, const float* b, int64_t m, int64_t n, int64_t depth, bool add,
                   int64_t bDepth) {
  multiply(c, ldc, a, b, m, n, depth, add, bDepth);
}
void narrowRow(uint16_t* dst, const float* src, int64_t n) { narrow(dst, src, n); }

#else

bool multipliesPairs() { return false; }
void packPairsAlong(float*, const uint16_t*, int64_t, int64_t, int64_t, int64_t) {}
void multiplyPairs(float*, int64_t, const float*, const float*, int64_t, int64_t, int64_t, bool, int64_t) {}
void narrowRow(uint16_t*, const float*, int64_t) {}

#endif

}  // namespace viaduct::cpu
