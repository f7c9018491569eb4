// Products of bfloat16 two by two; see pair_kernel.h. Intrinsics, because Highway 1.0 has no such instruction.
#include "pair_kernel.h"

#include <algorithm>

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

/// The sums of the lanes of four vectors.
VIADUCT_PAIRS inline __m128 sumsOf(__m512 a, __m512 b, __m512 c, __m512 e) {
#define HALVES(v) \
  _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)))
  const __m256 ab = _mm256_hadd_ps(HALVES(a), HALVES(b)), ce = _mm256_hadd_ps(HALVES(c), HALVES(e));
#undef HALVES
  const __m256 all = _mm256_hadd_ps(ab, ce);
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

constexpr int64_t kMostRows = 8, kThree = 3;

#define VIADUCT_EIGHT(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define VIADUCT_TIMES_THREE(r, load)            \
  if (r < rows) {                               \
    const __m512bh v = load(x##r);              \
    s##r##0 = _mm512_dpbf16_ps(s##r##0, v, w0); \
    s##r##1 = _mm512_dpbf16_ps(s##r##1, v, w1); \
    s##r##2 = _mm512_dpbf16_ps(s##r##2, v, w2); \
  }

/// sums[4 r + j] of four to eight rows and three columns `step` apart. Meanwhile the weights from `ahead` on come into the caches,
/// as one stream.
template <int rows>
VIADUCT_PAIRS inline void rowsTimesThree(float* sums, const uint16_t* x, int64_t ldx, const uint16_t* w, int64_t step,
                                         const uint16_t* ahead, int64_t k) {
#define X(r)                                                                  \
  __m512 s##r##0 = _mm512_setzero_ps(), s##r##1 = s##r##0, s##r##2 = s##r##0; \
  const uint16_t* x##r = x + (r < rows ? r : 0) * ldx;
  VIADUCT_EIGHT(X)
#undef X
  int64_t p = 0;
  for (; p + 2 * kLanes <= k; p += 2 * kLanes) {
    for (int64_t j = 0; j < kThree; ++j) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead + kThree * p + j * 2 * kLanes), _MM_HINT_T0);
    }
#define WHOLE(row) (__m512bh) _mm512_loadu_si512((row) + p)
    const __m512bh w0 = WHOLE(w), w1 = WHOLE(w + step), w2 = WHOLE(w + 2 * step);
#define X(r) VIADUCT_TIMES_THREE(r, WHOLE)
    VIADUCT_EIGHT(X)
#undef X
#undef WHOLE
  }
  if (p < k) {
    const auto mask = static_cast<__mmask32>((uint32_t{1} << (k - p)) - 1);
#define TAIL(row) (__m512bh) _mm512_maskz_loadu_epi16(mask, (row) + p)
    const __m512bh w0 = TAIL(w), w1 = TAIL(w + step), w2 = TAIL(w + 2 * step);
#define X(r) VIADUCT_TIMES_THREE(r, TAIL)
    VIADUCT_EIGHT(X)
#undef X
#undef TAIL
  }
#define X(r) \
  if (r < rows) _mm_storeu_ps(sums + 4 * r, sumsOf(s##r##0, s##r##1, s##r##2, _mm512_setzero_ps()));
  VIADUCT_EIGHT(X)
#undef X
}
#undef VIADUCT_TIMES_THREE
#undef VIADUCT_EIGHT

template <int rows>
VIADUCT_PAIRS void tileRows(float* c, int64_t ldc, const uint16_t* x, int64_t ldx, const uint16_t* w, int64_t ldw,
                            int64_t n, int64_t k, bool add, const float* bias) {
  float sums[4 * rows];
  for (int64_t j = 0; j < n;) {
    const int64_t columns = n - j >= kThree ? kThree : 1;
    const uint16_t* wj = w + j * ldw;
    rowsTimesThree<rows>(sums, x, ldx, wj, columns == 1 ? 0 : ldw, n - j >= 2 * kThree ? wj + kThree * ldw : wj, k);
    for (int64_t r = 0; r < rows; ++r) {
      float* o = c + r * ldc + j;
      for (int64_t e = 0; e < columns; ++e) {
        o[e] = (add ? o[e] : 0.0f) + sums[4 * r + e] + (bias != nullptr ? bias[j + e] : 0.0f);
      }
    }
    j += columns;
  }
}

using TileRows = void (*)(float*, int64_t, const uint16_t*, int64_t, const uint16_t*, int64_t, int64_t, int64_t, bool,
                          const float*);
constexpr TileRows kTiles[] = {tileRows<4>, tileRows<5>, tileRows<6>, tileRows<7>, tileRows<8>};
constexpr int64_t kLeastRows = 4;

void fewRows(float* c, int64_t ldc, const uint16_t* x, int64_t ldx, const uint16_t* w, int64_t ldw, int64_t m,
             int64_t n, int64_t k, bool add, const float* bias) {
  for (int64_t i = 0; i < m;) {
    const int64_t left = m - i, rows = left <= kMostRows ? left : std::min(kMostRows, left - kLeastRows);
    kTiles[rows - kLeastRows](c + i * ldc, ldc, x + i * ldx, ldx, w, ldw, n, k, add, bias);
    i += rows;
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
bool inPairs(const MatrixView& a, const MatrixView& b, int64_t k) {
  if (!multipliesPairs() || a.dtype != DType::BF16 || b.dtype != DType::BF16 || k == 0) return false;
  const auto wholeWords = [k](int64_t stride) { return k % 2 == 0 && stride % 2 == 0; };
  return (a.rowStride == 1 || wholeWords(a.rowStride)) && (b.colStride == 1 || wholeWords(b.colStride));
}

namespace {

MatrixView asWords(const MatrixView& v, int64_t rowStride, int64_t colStride) {
  return {v.data, DType::F32, rowStride, colStride};
}
const uint16_t* bitsOf(const MatrixView& v) { return static_cast<const uint16_t*>(v.data); }

void packPairRows(float* dst, const MatrixView& a, int64_t m, int64_t k) {
  if (a.rowStride == 1) return packPairsAlong(dst, bitsOf(a), a.colStride, m, kRows, k);
  packRows(dst, asWords(a, a.rowStride / 2, 1), m, k / 2);
}
void packPairColumns(float* dst, const MatrixView& b, int64_t k, int64_t n) {
  if (b.colStride == 1) return packPairsAlong(dst, bitsOf(b), b.rowStride, n, kColumns, k);
  packCols(dst, asWords(b, 1, b.colStride / 2), k / 2, n);
}

// As of the tiles of floats: a strip of b stays in the first cache, the packed rows of a in the second.
constexpr int64_t kChunk = 640;
constexpr int64_t kWidth = 4 * kColumns;

}  // namespace

void multiplyPairsOf(float* c, int64_t ldc, const MatrixView& a, const MatrixView& b, int64_t m, int64_t n, int64_t k,
                     bool add) {
  const int64_t chunks = (k + kChunk - 1) / kChunk;
  const int64_t length = roundUp((k + chunks - 1) / chunks, 16);
  float* rows = threadScratch(kPackA, roundUp(m, kRows) * words(length));
  float* columns = threadScratch(kPackB, kWidth * words(length));
  for (int64_t p = 0; p < k; p += length) {
    const int64_t depth = std::min(length, k - p);
    packPairRows(rows, a.at(0, p), m, depth);
    for (int64_t j = 0; j < n; j += kWidth) {
      const int64_t width = std::min(kWidth, n - j);
      packPairColumns(columns, b.at(p, j), depth, width);
      multiply(c + j, ldc, rows, columns, m, width, words(depth), add || p > 0, words(depth));
    }
  }
}
void multiplyFewPairs(float* c, int64_t ldc, const uint16_t* x, int64_t ldx, const uint16_t* w, int64_t ldw, int64_t m,
                      int64_t n, int64_t k, bool add, const float* bias) {
  fewRows(c, ldc, x, ldx, w, ldw, m, n, k, add, bias);
}
void narrowRow(uint16_t* dst, const float* src, int64_t n) { narrow(dst, src, n); }

#else

bool multipliesPairs() { return false; }
void packPairsAlong(float*, const uint16_t*, int64_t, int64_t, int64_t, int64_t) {}
void multiplyPairs(float*, int64_t, const float*, const float*, int64_t, int64_t, int64_t, bool, int64_t) {}
bool inPairs(const MatrixView&, const MatrixView&, int64_t) { return false; }
void multiplyPairsOf(float*, int64_t, const MatrixView&, const MatrixView&, int64_t, int64_t, int64_t, bool) {}
void multiplyFewPairs(float*, int64_t, const uint16_t*, int64_t, const uint16_t*, int64_t, int64_t, int64_t, int64_t,
                      bool, const float*) {}
void narrowRow(uint16_t*, const float*, int64_t) {}

#endif

}  // namespace viaduct::cpu
