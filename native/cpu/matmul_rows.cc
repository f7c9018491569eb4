// Few rows against weights that are contiguous along k, for decoding: nothing is packed, each weight is read once in its
// own dtype. Sums run in lanes along k. Up to three rows go column by column: a core fetches one sequential stream about three
// times as fast as four beside each other. More rows are bound by arithmetic: tiles of up to eight rows and three columns where 32
// registers hold them, else of three rows and four columns.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/matmul_rows.cc"
#include "matmul_kernel.h"
#include "vectors.h"
// vectors.h comes before other parts of Highway
#include "hwy/cache_control.h"

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {
HWY_INLINE V Load(const F16* p) {
  const hn::Rebind<hwy::float16_t, DF> dh;
  return hn::PromoteTo(DF(), hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(p)));
}

namespace {

// Two vectors of weights. BF16 ones come apart cheapest as even and odd: x lies in that order too, see OrderForWeights.
template <typename T>
HWY_INLINE void LoadPair(const T* w, V* first, V* second) {
  *first = Load(w);
  *second = Load(w + kLanes);
}
HWY_INLINE void LoadPair(const BF16* w, V* even, V* odd) {
  const hn::RebindToUnsigned<DF> du;
  const hn::Repartition<uint16_t, DF> dh;
  const auto both = hn::BitCast(du, hn::LoadU(dh, reinterpret_cast<const uint16_t*>(w)));
  *even = hn::BitCast(DF(), hn::ShiftLeft<16>(both));
  *odd = hn::BitCast(DF(), hn::And(both, hn::Set(du, 0xFFFF0000u)));
}

void OrderForWeights(float* x, int64_t k, DType weights) {
  if (weights != DType::BF16) return;
  float odd[kLanes];
  for (; k >= 2 * kLanes; k -= 2 * kLanes, x += 2 * kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      odd[i] = x[2 * i + 1];
      x[i] = x[2 * i];
    }
    for (int64_t i = 0; i < kLanes; ++i) x[kLanes + i] = odd[i];
  }
}

using DF4 = hn::FixedTag<float, 4>;
HWY_INLINE hn::Vec<DF4> AddHalves(DF4, hn::Vec<DF4> v) { return v; }
template <class D>
HWY_INLINE hn::Vec<DF4> AddHalves(D, hn::Vec<D> v) {
  const hn::Half<D> dh;
  return AddHalves(dh, hn::Add(hn::LowerHalf(dh, v), hn::UpperHalf(dh, v)));
}

// sums[0..4) = the sums of the lanes of a, b, c and e.
HWY_INLINE void StoreSums(V a, V b, V c, V e, float* sums) {
  const DF4 d;
  const auto a4 = AddHalves(DF(), a), b4 = AddHalves(DF(), b), c4 = AddHalves(DF(), c), e4 = AddHalves(DF(), e);
  const auto ab = hn::Add(hn::InterleaveLower(d, a4, b4), hn::InterleaveUpper(d, a4, b4));
  const auto ce = hn::Add(hn::InterleaveLower(d, c4, e4), hn::InterleaveUpper(d, c4, e4));
  hn::StoreU(hn::Add(hn::ConcatLowerLower(d, ce, ab), hn::ConcatUpperUpper(d, ce, ab)), d, sums);
}

#define VIADUCT_TIMES_FOUR(row, x, f)         \
  s##row##0 = hn::MulAdd(x, f##0, s##row##0); \
  s##row##1 = hn::MulAdd(x, f##1, s##row##1); \
  s##row##2 = hn::MulAdd(x, f##2, s##row##2); \
  s##row##3 = hn::MulAdd(x, f##3, s##row##3);

template <int kRows, typename T>
HWY_INLINE void RowsTimesFour(float* HWY_RESTRICT sums, const float* HWY_RESTRICT x, int64_t ldx,
                              const T* HWY_RESTRICT w, int64_t ldw, int64_t k) {
  const T* w0 = w;
  const T* w1 = w + ldw;
  const T* w2 = w + 2 * ldw;
  const T* w3 = w + 3 * ldw;
  const float* x1 = x + (kRows > 1 ? ldx : 0);
  const float* x2 = x + (kRows > 2 ? 2 * ldx : 0);
  auto s00 = Zero(), s01 = s00, s02 = s00, s03 = s00;
  auto s10 = s00, s11 = s00, s12 = s00, s13 = s00;
  auto s20 = s00, s21 = s00, s22 = s00, s23 = s00;
  auto f0 = s00, f1 = s00, f2 = s00, f3 = s00, g0 = s00, g1 = s00, g2 = s00, g3 = s00;
  int64_t p = 0;
  for (; p + 2 * kLanes <= k; p += 2 * kLanes) {
    LoadPair(w0 + p, &f0, &g0);
    LoadPair(w1 + p, &f1, &g1);
    LoadPair(w2 + p, &f2, &g2);
    LoadPair(w3 + p, &f3, &g3);
    const auto v0 = Load(x + p);
    const auto u0 = Load(x + p + kLanes);
    VIADUCT_TIMES_FOUR(0, v0, f)
    if (kRows == 1) {  // sums of their own: one row alone would wait for its additions
      VIADUCT_TIMES_FOUR(1, u0, g)
    } else {
      VIADUCT_TIMES_FOUR(0, u0, g)
      const auto v1 = Load(x1 + p);
      const auto u1 = Load(x1 + p + kLanes);
      VIADUCT_TIMES_FOUR(1, v1, f)
      VIADUCT_TIMES_FOUR(1, u1, g)
    }
    if (kRows > 2) {
      const auto v2 = Load(x2 + p);
      const auto u2 = Load(x2 + p + kLanes);
      VIADUCT_TIMES_FOUR(2, v2, f)
      VIADUCT_TIMES_FOUR(2, u2, g)
    }
  }
  if (kRows == 1) {
    s00 = hn::Add(s00, s10);
    s01 = hn::Add(s01, s11);
    s02 = hn::Add(s02, s12);
    s03 = hn::Add(s03, s13);
  }
  if (p + kLanes <= k) {
    f0 = Load(w0 + p);
    f1 = Load(w1 + p);
    f2 = Load(w2 + p);
    f3 = Load(w3 + p);
    const auto v0 = Load(x + p);
    VIADUCT_TIMES_FOUR(0, v0, f)
    if (kRows > 1) {
      const auto v1 = Load(x1 + p);
      VIADUCT_TIMES_FOUR(1, v1, f)
    }
    if (kRows > 2) {
      const auto v2 = Load(x2 + p);
      VIADUCT_TIMES_FOUR(2, v2, f)
    }
    p += kLanes;
  }
  StoreSums(s00, s01, s02, s03, sums);
  if (kRows > 1) StoreSums(s10, s11, s12, s13, sums + 4);
  if (kRows > 2) StoreSums(s20, s21, s22, s23, sums + 8);
  for (; p < k; ++p) {
    const float f[4] = {toFloat(w0[p]), toFloat(w1[p]), toFloat(w2[p]), toFloat(w3[p])};
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < 4; ++j) sums[4 * r + j] += x[r * ldx + p] * f[j];
    }
  }
}
#undef VIADUCT_TIMES_FOUR

template <typename T>
HWY_INLINE void AddPair(const float* HWY_RESTRICT x, const T* HWY_RESTRICT w, V* even, V* odd) {
  V f, g;
  LoadPair(w, &f, &g);
  *even = hn::MulAdd(Load(x), f, *even);
  *odd = hn::MulAdd(Load(x + kLanes), g, *odd);
}

// The lanes' sums of one row times one column, without the k % kLanes last elements.
template <typename T>
HWY_INLINE V RowTimesColumn(const float* HWY_RESTRICT x, const T* HWY_RESTRICT w, int64_t k) {
  V a0 = Zero(), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
  int64_t p = 0;
  for (; p + 8 * kLanes <= k; p += 8 * kLanes) {
    AddPair(x + p, w + p, &a0, &b0);
    AddPair(x + p + 2 * kLanes, w + p + 2 * kLanes, &a1, &b1);
    AddPair(x + p + 4 * kLanes, w + p + 4 * kLanes, &a2, &b2);
    AddPair(x + p + 6 * kLanes, w + p + 6 * kLanes, &a3, &b3);
  }
  for (; p + 2 * kLanes <= k; p += 2 * kLanes) AddPair(x + p, w + p, &a0, &b0);
  if (p + kLanes <= k) a0 = hn::MulAdd(Load(x + p), Load(w + p), a0);
  return hn::Add(hn::Add(hn::Add(a0, b0), hn::Add(a1, b1)), hn::Add(hn::Add(a2, b2), hn::Add(a3, b3)));
}

// As RowTimesColumn, for two or three rows.
template <int kRows, typename T>
HWY_INLINE void RowsTimesColumn(const float* HWY_RESTRICT x, int64_t ldx, const T* HWY_RESTRICT w, int64_t k, V* s0,
                                V* s1, V* s2) {
  const float* x1 = x + ldx;
  const float* x2 = x + (kRows > 2 ? 2 * ldx : 0);
  V a0 = Zero(), a1 = a0, a2 = a0, b0 = a0, b1 = a0, b2 = a0;
  int64_t p = 0;
  for (; p + 2 * kLanes <= k; p += 2 * kLanes) {
    V f, g;
    LoadPair(w + p, &f, &g);
    a0 = hn::MulAdd(Load(x + p), f, a0);
    b0 = hn::MulAdd(Load(x + p + kLanes), g, b0);
    a1 = hn::MulAdd(Load(x1 + p), f, a1);
    b1 = hn::MulAdd(Load(x1 + p + kLanes), g, b1);
    if (kRows > 2) {
      a2 = hn::MulAdd(Load(x2 + p), f, a2);
      b2 = hn::MulAdd(Load(x2 + p + kLanes), g, b2);
    }
  }
  if (p + kLanes <= k) {
    const V f = Load(w + p);
    a0 = hn::MulAdd(Load(x + p), f, a0);
    a1 = hn::MulAdd(Load(x1 + p), f, a1);
    if (kRows > 2) a2 = hn::MulAdd(Load(x2 + p), f, a2);
  }
  *s0 = hn::Add(a0, b0);
  *s1 = hn::Add(a1, b1);
  *s2 = hn::Add(a2, b2);
}

// sums[4 r + j] of up to four columns, one after the other.
template <int kRows, typename T>
HWY_INLINE void RowsTimesColumns(float* HWY_RESTRICT sums, const float* HWY_RESTRICT x, int64_t ldx,
                                 const T* HWY_RESTRICT w, int64_t ldw, int64_t k, int64_t cols) {
  V s[3][4] = {{Zero(), Zero(), Zero(), Zero()}, {Zero(), Zero(), Zero(), Zero()}, {Zero(), Zero(), Zero(), Zero()}};
  for (int64_t j = 0; j < cols; ++j) {
    if (kRows == 1) {
      s[0][j] = RowTimesColumn(x, w + j * ldw, k);
    } else {
      RowsTimesColumn<kRows>(x, ldx, w + j * ldw, k, &s[0][j], &s[1][j], &s[2][j]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    StoreSums(s[r][0], s[r][1], s[r][2], s[r][3], sums + 4 * r);
    for (int64_t p = k / kLanes * kLanes; p < k; ++p) {
      for (int64_t j = 0; j < cols; ++j) sums[4 * r + j] += x[r * ldx + p] * toFloat(w[j * ldw + p]);
    }
  }
}

template <int kRows, typename T>
HWY_NOINLINE void StreamColumns(float* c, int64_t ldc, const float* x, int64_t ldx, const T* w, int64_t ldw, int64_t n,
                                int64_t k, bool add, const float* bias) {
  float sums[4 * kRows];
  for (int64_t j = 0; j < n; j += 4) {
    const int64_t cols = HWY_MIN(int64_t{4}, n - j);
    RowsTimesColumns<kRows>(sums, x, ldx, w + j * ldw, ldw, k, cols);
    for (int64_t r = 0; r < kRows; ++r) {
      float* o = c + r * ldc + j;
      for (int64_t e = 0; e < cols; ++e) {
        o[e] = (add ? o[e] : 0.0f) + sums[4 * r + e] + (bias != nullptr ? bias[j + e] : 0.0f);
      }
    }
  }
}

#if HWY_TARGET <= HWY_AVX3  // 32 registers of 16 lanes
#define VIADUCT_EIGHT(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)

// Four to eight rows times three columns `step` apart: sums[4 r + j], with nothing in j = 3. Meanwhile the weights from `ahead`
// on come into the caches, as one stream.
template <int kRows, typename T>
HWY_INLINE void RowsTimesThree(float* HWY_RESTRICT sums, const float* HWY_RESTRICT x, int64_t ldx,
                               const T* HWY_RESTRICT w, int64_t step, const T* ahead, int64_t k) {
  const T* w1 = w + step;
  const T* w2 = w + 2 * step;
  V f0 = Zero(), f1 = f0, f2 = f0, g0 = f0, g1 = f0, g2 = f0;
#define X(r)                                                \
  V s##r##0 = Zero(), s##r##1 = s##r##0, s##r##2 = s##r##0; \
  const float* x##r = x + (r < kRows ? r : 0) * ldx;
  VIADUCT_EIGHT(X)
#undef X
#define VIADUCT_TIMES_THREE(r, at, f)       \
  if (r < kRows) {                          \
    const V v = Load(x##r + at);            \
    s##r##0 = hn::MulAdd(v, f##0, s##r##0); \
    s##r##1 = hn::MulAdd(v, f##1, s##r##1); \
    s##r##2 = hn::MulAdd(v, f##2, s##r##2); \
  }
  int64_t p = 0;
  for (; p + 2 * kLanes <= k; p += 2 * kLanes) {
    for (int64_t line = 0; line < 6 * kLanes; line += 64 / static_cast<int64_t>(sizeof(T))) {
      hwy::Prefetch(ahead + 3 * p + line);
    }
    LoadPair(w + p, &f0, &g0);
    LoadPair(w1 + p, &f1, &g1);
    LoadPair(w2 + p, &f2, &g2);
#define X(r) VIADUCT_TIMES_THREE(r, p, f)
    VIADUCT_EIGHT(X)
#undef X
#define X(r) VIADUCT_TIMES_THREE(r, p + kLanes, g)
    VIADUCT_EIGHT(X)
#undef X
  }
  if (p + kLanes <= k) {
    f0 = Load(w + p);
    f1 = Load(w1 + p);
    f2 = Load(w2 + p);
#define X(r) VIADUCT_TIMES_THREE(r, p, f)
    VIADUCT_EIGHT(X)
#undef X
    p += kLanes;
  }
#undef VIADUCT_TIMES_THREE
#define X(r) \
  if (r < kRows) StoreSums(s##r##0, s##r##1, s##r##2, Zero(), sums + 4 * r);
  VIADUCT_EIGHT(X)
#undef X
  for (; p < k; ++p) {
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < 3; ++j) sums[4 * r + j] += x[r * ldx + p] * toFloat(w[j * step + p]);
    }
  }
}
#undef VIADUCT_EIGHT

template <int kRows, typename T>
HWY_NOINLINE void TileRows(float* c, int64_t ldc, const float* x, int64_t ldx, const T* w, int64_t ldw, int64_t n,
                           int64_t k, bool add, const float* bias) {
  float sums[4 * kRows];
  for (int64_t j = 0; j < n;) {
    const int64_t cols = n - j >= 3 ? 3 : 1;
    const T* wj = w + j * ldw;
    RowsTimesThree<kRows>(sums, x, ldx, wj, cols == 3 ? ldw : 0, n - j >= 6 ? wj + 3 * ldw : wj, k);
    for (int64_t r = 0; r < kRows; ++r) {
      float* o = c + r * ldc + j;
      for (int64_t e = 0; e < cols; ++e) {
        o[e] = (add ? o[e] : 0.0f) + sums[4 * r + e] + (bias != nullptr ? bias[j + e] : 0.0f);
      }
    }
    j += cols;
  }
}

template <typename T>
void TiledRows(float* c, int64_t ldc, const float* x, int64_t ldx, const T* w, int64_t ldw, int64_t m, int64_t n,
               int64_t k, bool add, const float* bias) {
  using Tile =
      void (*)(float*, int64_t, const float*, int64_t, const T*, int64_t, int64_t, int64_t, bool, const float*);
  constexpr Tile kTiles[] = {TileRows<4, T>, TileRows<5, T>, TileRows<6, T>, TileRows<7, T>, TileRows<8, T>};
  for (int64_t i = 0; i < m;) {
    const int64_t left = m - i, rows = left <= 8 ? left : HWY_MIN(int64_t{8}, left - 4);
    kTiles[rows - 4](c + i * ldc, ldc, x + i * ldx, ldx, w, ldw, n, k, add, bias);
    i += rows;
  }
}
#endif

template <typename T>
HWY_NOINLINE void FewRows(float* c, int64_t ldc, const float* x, int64_t ldx, const T* w, int64_t ldw, int64_t m,
                          int64_t n, int64_t k, bool add, const float* bias) {
  float sums[12];
  // Short rows far apart, the keys of one head: the hardware does not foresee their addresses.
  constexpr int64_t kAhead = 16;
  const bool apart = ldw != k && k * static_cast<int64_t>(sizeof(T)) <= 1024;
  if (!apart && m == 1) return StreamColumns<1>(c, ldc, x, ldx, w, ldw, n, k, add, bias);
  if (!apart && m == 2) return StreamColumns<2>(c, ldc, x, ldx, w, ldw, n, k, add, bias);
  if (!apart && m == 3) return StreamColumns<3>(c, ldc, x, ldx, w, ldw, n, k, add, bias);
#if HWY_TARGET <= HWY_AVX3
  if (!apart) return TiledRows(c, ldc, x, ldx, w, ldw, m, n, k, add, bias);
#endif
  for (int64_t j = 0; j < n; j += 4) {
    const int64_t cols = HWY_MIN(int64_t{4}, n - j);
    const T* wj = w + j * ldw;
    if (apart) {
      for (int64_t e = 0; e < HWY_MIN(int64_t{4}, n - j - kAhead); ++e) {
        const T* next = wj + (kAhead + e) * ldw;
        for (int64_t p = 0; p < k; p += 64 / static_cast<int64_t>(sizeof(T))) hwy::Prefetch(next + p);
      }
    }
    const int64_t step = cols == 4 ? ldw : 0;  // the last columns: one at a time, the other three repeat it
    for (int64_t i = 0; i < m; i += 3) {
      const int64_t rows = HWY_MIN(int64_t{3}, m - i);
      for (int64_t e = 0; e < (step == 0 ? cols : 1); ++e) {
        const T* we = wj + e * ldw;
        if (rows == 3) {
          RowsTimesFour<3>(sums, x + i * ldx, ldx, we, step, k);
        } else if (rows == 2) {
          RowsTimesFour<2>(sums, x + i * ldx, ldx, we, step, k);
        } else {
          RowsTimesFour<1>(sums, x + i * ldx, ldx, we, step, k);
        }
        for (int64_t r = 0; r < rows; ++r) {
          float* o = c + (i + r) * ldc + j + e;
          if (step != 0) {
            const DF4 d;
            auto v = hn::LoadU(d, sums + 4 * r);
            if (add) v = hn::Add(hn::LoadU(d, o), v);
            if (bias != nullptr) v = hn::Add(v, hn::LoadU(d, bias + j));
            hn::StoreU(v, d, o);
            continue;
          }
          *o = (add ? *o : 0.0f) + sums[4 * r] + (bias != nullptr ? bias[j + e] : 0.0f);
        }
      }
    }
  }
}

void MultiplyFewRows(float* c, int64_t ldc, const float* x, int64_t ldx, const MatrixView& b, int64_t m, int64_t n,
                     int64_t k, bool add, const float* bias) {
  if (b.dtype == DType::F32) {
    FewRows(c, ldc, x, ldx, static_cast<const float*>(b.data), b.colStride, m, n, k, add, bias);
  } else if (b.dtype == DType::BF16) {
    FewRows(c, ldc, x, ldx, static_cast<const BF16*>(b.data), b.colStride, m, n, k, add, bias);
  } else {
    FewRows(c, ldc, x, ldx, static_cast<const F16*>(b.data), b.colStride, m, n, k, add, bias);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace viaduct::cpu {

HWY_EXPORT(MultiplyFewRows);
HWY_EXPORT(OrderForWeights);

void orderForWeights(float* x, int64_t k, DType weights) { HWY_DYNAMIC_DISPATCH(OrderForWeights)(x, k, weights); }
void multiplyFewRows(float* c, int64_t ldc, const float* x, int64_t ldx, const MatrixView& b, int64_t m, int64_t n,
                     int64_t k, bool add, const float* bias) {
  HWY_DYNAMIC_DISPATCH(MultiplyFewRows)(c, ldc, x, ldx, b, m, n, k, add, bias);
}

}  // namespace viaduct::cpu
#endif  // HWY_ONCE
