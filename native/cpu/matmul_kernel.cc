// The blocked matmul in portable SIMD: pack both sides into strips, multiply them in a tile of registers. Chunks of k are
// kChunk long by shape alone. dtypes are widened while packing, so the inner loop is always F32.
#include "simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/matmul_kernel.cc"
#include "../half.h"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"
#include "matmul_kernel.h"

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using DF4 = hn::FixedTag<float, 4>;

// 32 vector registers hold 12 x 2 accumulators, 16 hold 6 x 2.
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64
constexpr int64_t kMr = 12;
#else
constexpr int64_t kMr = 6;
#endif
HWY_INLINE int64_t Nr() { return 2 * static_cast<int64_t>(hn::Lanes(DF())); }

template <class D>
HWY_INLINE hn::Vec<D> LoadFloat(D d, const float* p) {
  return hn::LoadU(d, p);
}
template <class D>
HWY_INLINE hn::Vec<D> LoadFloat(D d, const hwy::bfloat16_t* p) {
  const hn::Rebind<hwy::bfloat16_t, D> dh;
  return hn::PromoteTo(d, hn::LoadU(dh, p));
}
template <class D>
HWY_INLINE hn::Vec<D> LoadFloat(D d, const hwy::float16_t* p) {
  const hn::Rebind<hwy::float16_t, D> dh;
  return hn::PromoteTo(d, hn::LoadU(dh, p));
}
HWY_INLINE float ScalarFloat(const float* p) { return *p; }
HWY_INLINE float ScalarFloat(const hwy::bfloat16_t* p) { return toFloat(BF16{p->bits}); }
HWY_INLINE float ScalarFloat(const hwy::float16_t* p) {
  F16 bits;  // a native type on Arm, a struct elsewhere
  std::memcpy(&bits, p, sizeof(bits));
  return toFloat(bits);
}

// Four lines of four -> four columns, dst[j * ldd + 0..3].
HWY_INLINE void Transpose4(hn::Vec<DF4> r0, hn::Vec<DF4> r1, hn::Vec<DF4> r2, hn::Vec<DF4> r3, float* HWY_RESTRICT dst,
                           int64_t ldd) {
  const DF4 d;
  const hn::Repartition<double, DF4> dd;
  const auto t0 = hn::BitCast(dd, hn::InterleaveLower(d, r0, r1));
  const auto t1 = hn::BitCast(dd, hn::InterleaveLower(d, r2, r3));
  const auto t2 = hn::BitCast(dd, hn::InterleaveUpper(d, r0, r1));
  const auto t3 = hn::BitCast(dd, hn::InterleaveUpper(d, r2, r3));
  hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, t0, t1)), d, dst);
  hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, t0, t1)), d, dst + ldd);
  hn::StoreU(hn::BitCast(d, hn::InterleaveLower(dd, t2, t3)), d, dst + 2 * ldd);
  hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(dd, t2, t3)), d, dst + 3 * ldd);
}

// Lines src[i * lds + 0..k), i < lines <= width, become dst[p * width + i]; missing lines are 0.
template <typename T>
HWY_NOINLINE void PackAcross(float* HWY_RESTRICT dst, const T* HWY_RESTRICT src, int64_t lds, int64_t lines,
                             int64_t width, int64_t k) {
  const DF4 d;
  int64_t i = 0;
  for (; i + 4 <= lines; i += 4) {
    const T* s = src + i * lds;
    int64_t p = 0;
    for (; p + 4 <= k; p += 4) {
      Transpose4(LoadFloat(d, s + p), LoadFloat(d, s + lds + p), LoadFloat(d, s + 2 * lds + p),
                 LoadFloat(d, s + 3 * lds + p), dst + p * width + i, width);
    }
    for (; p < k; ++p) {
      for (int64_t r = 0; r < 4; ++r) dst[p * width + i + r] = ScalarFloat(s + r * lds + p);
    }
  }
  if (i + 2 <= lines) {
    const T* s = src + i * lds;
    const hn::FixedTag<float, 2> d2;
    int64_t p = 0;
    for (; p + 4 <= k; p += 4) {
      const auto r0 = LoadFloat(d, s + p);
      const auto r1 = LoadFloat(d, s + lds + p);
      const auto lo = hn::InterleaveLower(d, r0, r1);
      const auto hi = hn::InterleaveUpper(d, r0, r1);
      float* o = dst + p * width + i;
      hn::StoreU(hn::LowerHalf(d2, lo), d2, o);
      hn::StoreU(hn::UpperHalf(d2, lo), d2, o + width);
      hn::StoreU(hn::LowerHalf(d2, hi), d2, o + 2 * width);
      hn::StoreU(hn::UpperHalf(d2, hi), d2, o + 3 * width);
    }
    for (; p < k; ++p) {
      dst[p * width + i] = ScalarFloat(s + p);
      dst[p * width + i + 1] = ScalarFloat(s + lds + p);
    }
    i += 2;
  }
  for (; i < width; ++i) {
    if (i < lines) {
      for (int64_t p = 0; p < k; ++p) dst[p * width + i] = ScalarFloat(src + i * lds + p);
    } else {
      for (int64_t p = 0; p < k; ++p) dst[p * width + i] = 0.0f;
    }
  }
}

// Rows src[p * lds + 0..n) go to strips of `width` columns: dst[(j / width) * width * k + p * width + j % width]. Wide strips
// take row by row; narrow ones (width < lanes) eight rows at a time, so that a strip is written in longer runs.
template <typename T>
HWY_NOINLINE void PackAlong(float* HWY_RESTRICT dst, const T* HWY_RESTRICT src, int64_t lds, int64_t n, int64_t width,
                            int64_t k) {
  const DF d;
  const DF4 d4;
  const hn::FixedTag<float, 2> d2;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t atOnce = width < lanes ? 8 : 1;
  constexpr int64_t kAhead = 8;  // rows: their addresses are too far apart for the hardware to foresee
  for (int64_t p0 = 0; p0 < k; p0 += atOnce) {
    const int64_t p1 = HWY_MIN(p0 + atOnce, k);
    if (atOnce == 1 && p0 + kAhead < k) {
      const T* next = src + (p0 + kAhead) * lds;
      for (int64_t j = 0; j < n; j += 64 / static_cast<int64_t>(sizeof(T))) hwy::Prefetch(next + j);
    }
    int64_t j = 0;
    for (; j + width <= n; j += width) {
      const T* s = src + p0 * lds + j;
      float* o = dst + j * k + p0 * width;
      if (width == 2 * lanes) {
        hn::StoreU(LoadFloat(d, s), d, o);
        hn::StoreU(LoadFloat(d, s + lanes), d, o + lanes);
        continue;
      }
      int64_t p = p0;
      if (width < lanes && j + lanes <= n) {
        // A whole vector; the next row overwrites what is too much. Not for the last row: the next strip follows it.
        for (; p < HWY_MIN(p1, k - 1); ++p, s += lds, o += width) hn::StoreU(LoadFloat(d, s), d, o);
      }
      for (; p < p1; ++p, s += lds, o += width) {
        int64_t w = 0;
        for (; w + 4 <= width; w += 4) hn::StoreU(LoadFloat(d4, s + w), d4, o + w);
        for (; w + 2 <= width; w += 2) hn::StoreU(LoadFloat(d2, s + w), d2, o + w);
      }
    }
    if (j < n) {
      for (int64_t p = p0; p < p1; ++p) {
        float* o = dst + j * k + p * width;
        for (int64_t w = 0; w < width; ++w) o[w] = j + w < n ? ScalarFloat(src + p * lds + j + w) : 0.0f;
      }
    }
  }
}

// `lines` of the packed dimension, k of the other; lineStride or kStride is 1.
template <typename T>
void Pack(float* dst, const T* src, int64_t lineStride, int64_t kStride, int64_t lines, int64_t width, int64_t k) {
  if (lineStride == 1 && (kStride != 1 || lines > 1)) {
    PackAlong(dst, src, kStride, lines, width, k);
    return;
  }
  for (int64_t i = 0; i < lines; i += width) {
    PackAcross(dst + i * k, src + i * lineStride, lineStride, HWY_MIN(width, lines - i), width, k);
  }
}

void PackAny(float* dst, const MatrixView& v, int64_t lineStride, int64_t kStride, int64_t lines, int64_t width,
             int64_t k) {
  if (v.dtype == DType::F32) {
    Pack(dst, static_cast<const float*>(v.data), lineStride, kStride, lines, width, k);
  } else if (v.dtype == DType::BF16) {
    Pack(dst, static_cast<const hwy::bfloat16_t*>(v.data), lineStride, kStride, lines, width, k);
  } else {
    Pack(dst, static_cast<const hwy::float16_t*>(v.data), lineStride, kStride, lines, width, k);
  }
}

void PackRows(float* dst, const MatrixView& a, int64_t m, int64_t k) {
  PackAny(dst, a, a.rowStride, a.colStride, m, kMr, k);
}
void PackCols(float* dst, const MatrixView& b, int64_t k, int64_t n) {
  PackAny(dst, b, b.colStride, b.rowStride, n, Nr(), k);
}

#undef VIADUCT_ROWS6
#undef VIADUCT_ROWS12
#define VIADUCT_ROWS6(X) X(0) X(1) X(2) X(3) X(4) X(5)
#define VIADUCT_ROWS12(X) VIADUCT_ROWS6(X) X(6) X(7) X(8) X(9) X(10) X(11)
#undef VIADUCT_ROWS
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64
#define VIADUCT_ROWS(X) VIADUCT_ROWS12(X)
#else
#define VIADUCT_ROWS(X) VIADUCT_ROWS6(X)
#endif

// One register tile: c[kMr, Nr] = (add ? c : 0) + a b (+ bias).
HWY_INLINE void RegisterTile(float* HWY_RESTRICT c, int64_t ldc, const float* HWY_RESTRICT a,
                             const float* HWY_RESTRICT b, int64_t k, bool add, const float* HWY_RESTRICT bias) {
  const DF d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
#define X(i)                  \
  hwy::Prefetch(c + i * ldc); \
  hwy::Prefetch(c + i * ldc + 2 * lanes - 1);
  VIADUCT_ROWS(X)
#undef X
#define X(i)                  \
  auto s##i##0 = hn::Zero(d); \
  auto s##i##1 = hn::Zero(d);
  VIADUCT_ROWS(X)
#undef X
  for (int64_t p = 0; p < k; ++p) {
    const auto b0 = hn::LoadU(d, b);
    const auto b1 = hn::LoadU(d, b + lanes);
#define X(i)                              \
  {                                       \
    const auto w = hn::Set(d, a[i]);      \
    s##i##0 = hn::MulAdd(w, b0, s##i##0); \
    s##i##1 = hn::MulAdd(w, b1, s##i##1); \
  }
    VIADUCT_ROWS(X)
#undef X
    a += kMr;
    b += 2 * lanes;
  }
  if (bias != nullptr) {
    const auto b0 = hn::LoadU(d, bias);
    const auto b1 = hn::LoadU(d, bias + lanes);
#define X(i)                      \
  s##i##0 = hn::Add(s##i##0, b0); \
  s##i##1 = hn::Add(s##i##1, b1);
    VIADUCT_ROWS(X)
#undef X
  }
  if (add) {
#define X(i)                                                             \
  {                                                                      \
    float* o = c + i * ldc;                                              \
    hn::StoreU(hn::Add(hn::LoadU(d, o), s##i##0), d, o);                 \
    hn::StoreU(hn::Add(hn::LoadU(d, o + lanes), s##i##1), d, o + lanes); \
  }
    VIADUCT_ROWS(X)
#undef X
  } else {
#define X(i)                           \
  {                                    \
    float* o = c + i * ldc;            \
    hn::StoreU(s##i##0, d, o);         \
    hn::StoreU(s##i##1, d, o + lanes); \
  }
    VIADUCT_ROWS(X)
#undef X
  }
}

constexpr int64_t kMaxNr = 2 * HWY_MAX_BYTES / sizeof(float);

// The same for a tile that hangs over the edge of c: m <= kMr, n <= Nr.
HWY_NOINLINE void EdgeTile(float* HWY_RESTRICT c, int64_t ldc, const float* a, const float* b, int64_t m, int64_t n,
                           int64_t k, bool add, const float* bias) {
  HWY_ALIGN float t[kMr * kMaxNr];
  HWY_ALIGN float edge[kMaxNr];
  if (bias != nullptr) {
    for (int64_t j = 0; j < Nr(); ++j) edge[j] = j < n ? bias[j] : 0.0f;
  }
  RegisterTile(t, Nr(), a, b, k, false, bias != nullptr ? edge : nullptr);
  for (int64_t i = 0; i < m; ++i) {
    float* o = c + i * ldc;
    const float* s = t + i * Nr();
    if (add) {
      for (int64_t j = 0; j < n; ++j) o[j] += s[j];
    } else {
      for (int64_t j = 0; j < n; ++j) o[j] = s[j];
    }
  }
}

void MultiplyPacked(float* c, int64_t ldc, const float* a, const float* b, int64_t m, int64_t n, int64_t k, bool add,
                    const float* bias, int64_t bDepth) {
  const int64_t nr = Nr();
  for (int64_t j = 0; j < n; j += nr) {
    const float* bs = b + j * bDepth;
    const float* bias1 = bias != nullptr ? bias + j : nullptr;
    for (int64_t i = 0; i < m; i += kMr) {
      if (i + kMr <= m && j + nr <= n) {
        RegisterTile(c + i * ldc + j, ldc, a + i * k, bs, k, add, bias1);
      } else {
        EdgeTile(c + i * ldc + j, ldc, a + i * k, bs, HWY_MIN(kMr, m - i), HWY_MIN(nr, n - j), k, add, bias1);
      }
    }
  }
}

// Chunks of k: a strip of b (nr x chunk) stays in the first-level cache, the packed rows of a in the second.
constexpr int64_t kChunk = 320;
constexpr int64_t kStripsAtOnce = 4;

void MultiplyTile(float* c, int64_t ldc, const MatrixView& a, const MatrixView& b, int64_t m, int64_t n, int64_t k,
                  bool add, const float* bias) {
  const int64_t chunks = HWY_MAX(int64_t{1}, (k + kChunk - 1) / kChunk);
  const int64_t length = HWY_MAX(int64_t{8}, roundUp((k + chunks - 1) / chunks, 8));
  const int64_t width = kStripsAtOnce * Nr();
  float* pa = threadScratch(kPackA, roundUp(m, kMr) * length);
  float* pb = threadScratch(kPackB, width * length);
  for (int64_t p = 0; p == 0 || p < k; p += length) {
    const int64_t kc = HWY_MIN(length, k - p);
    PackRows(pa, a.at(0, p), m, kc);
    for (int64_t j = 0; j < n; j += width) {
      const int64_t nc = HWY_MIN(width, n - j);
      PackCols(pb, b.at(p, j), kc, nc);
      MultiplyPacked(c + j, ldc, pa, pb, m, nc, kc, add || p > 0, p == 0 && bias != nullptr ? bias + j : nullptr, kc);
    }
  }
}

TileShape RegisterTileShape() { return {kMr, Nr()}; }
const char* SimdTarget() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <cstdlib>
#include <new>

namespace viaduct::cpu {

HWY_EXPORT(RegisterTileShape);
HWY_EXPORT(SimdTarget);
HWY_EXPORT(PackRows);
HWY_EXPORT(PackCols);
HWY_EXPORT(MultiplyPacked);
HWY_EXPORT(MultiplyTile);

TileShape registerTile() { return HWY_DYNAMIC_DISPATCH(RegisterTileShape)(); }
const char* simdTarget() { return HWY_DYNAMIC_DISPATCH(SimdTarget)(); }
void packRows(float* dst, const MatrixView& a, int64_t m, int64_t k) { HWY_DYNAMIC_DISPATCH(PackRows)(dst, a, m, k); }
void packCols(float* dst, const MatrixView& b, int64_t k, int64_t n) { HWY_DYNAMIC_DISPATCH(PackCols)(dst, b, k, n); }
void multiplyPacked(float* c, int64_t ldc, const float* a, const float* b, int64_t m, int64_t n, int64_t k, bool add,
                    const float* bias, int64_t bDepth) {
  HWY_DYNAMIC_DISPATCH(MultiplyPacked)(c, ldc, a, b, m, n, k, add, bias, bDepth > 0 ? bDepth : k);
}
void multiplyTile(float* c, int64_t ldc, const MatrixView& a, const MatrixView& b, int64_t m, int64_t n, int64_t k,
                  bool add, const float* bias) {
  HWY_DYNAMIC_DISPATCH(MultiplyTile)(c, ldc, a, b, m, n, k, add, bias);
}

namespace {

struct Buffer {
  float* data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

float* threadScratch(int which, int64_t floats) {
  thread_local Buffer buffers[kScratchCount];
  Buffer& b = buffers[which];
  if (b.size < floats) {
    std::free(b.data);
    b.size = 0;
    b.data = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(roundUp(floats, 1024)) * sizeof(float)));
    if (b.data == nullptr) throw std::bad_alloc();
    b.size = roundUp(floats, 1024);
  }
  return b.data;
}

}  // namespace viaduct::cpu
#endif  // HWY_ONCE
