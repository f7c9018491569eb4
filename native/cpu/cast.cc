// Conversions between dtypes, one row at a time: any stride in scalar code, unit strides of common pairs in vectors.
// Both give the same bits. Walking shapes is copy.cc's part.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/cast.cc"
#include "vectors.h"

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {
namespace {

void WidenBF16(float* y, const BF16* x, int64_t size) {
  ForVectors(size, [=](int64_t i, int64_t n) HWY_ATTR {
    alignas(64) BF16 buffer[kLanes] = {};
    const BF16* from = x + i;
    if (n < kLanes) {
      std::memcpy(buffer, from, static_cast<size_t>(n) * sizeof(BF16));
      from = buffer;
    }
    Store(Load(from), y + i, n);
  });
}

void NarrowBF16(BF16* y, const float* x, int64_t size) {
  ForVectors(size, [=](int64_t i, int64_t n) HWY_ATTR { Store(Load(x + i, n), y + i, n); });
}

// F16C does what half.h does, also for a NaN. Without it the scalar form serves.
void WidenF16(float* y, const F16* x, int64_t size) {
  int64_t i = 0;
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2 && !defined(HWY_DISABLE_F16C)
  for (; i + 8 <= size; i += 8)
    _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
#endif
  for (; i < size; ++i) y[i] = toFloat(x[i]);
}

void NarrowF16(F16* y, const float* x, int64_t size) {
  int64_t i = 0;
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2 && !defined(HWY_DISABLE_F16C)
  for (; i + 8 <= size; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < size; ++i) y[i] = fromFloat<F16>(x[i]);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "cast.h"

namespace viaduct::cpu {

HWY_EXPORT(WidenBF16);
HWY_EXPORT(NarrowBF16);
HWY_EXPORT(WidenF16);
HWY_EXPORT(NarrowF16);

namespace {

template <typename To, typename From, template <typename, typename> class Rule>
void strided(void* yAny, int64_t yStride, const void* xAny, int64_t xStride, int64_t n) {
  To* y = static_cast<To*>(yAny);
  const From* x = static_cast<const From*>(xAny);
  if (yStride == 1 && xStride == 1) {
    for (int64_t i = 0; i < n; ++i) y[i] = Rule<To, From>::one(x[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) y[i * yStride] = Rule<To, From>::one(x[i * xStride]);
  }
}

// A vector form where both strides are 1, the scalar form elsewhere.
template <typename To, typename From, typename Vector>
void fast(Vector vector, void* y, int64_t yStride, const void* x, int64_t xStride, int64_t n) {
  if (yStride == 1 && xStride == 1) return vector(static_cast<To*>(y), static_cast<const From*>(x), n);
  strided<To, From, Cast>(y, yStride, x, xStride, n);
}

void bf16ToF32(void* y, int64_t yStride, const void* x, int64_t xStride, int64_t n) {
  fast<float, BF16>(HWY_DYNAMIC_DISPATCH(WidenBF16), y, yStride, x, xStride, n);
}
void f32ToBF16(void* y, int64_t yStride, const void* x, int64_t xStride, int64_t n) {
  fast<BF16, float>(HWY_DYNAMIC_DISPATCH(NarrowBF16), y, yStride, x, xStride, n);
}
void f16ToF32(void* y, int64_t yStride, const void* x, int64_t xStride, int64_t n) {
  fast<float, F16>(HWY_DYNAMIC_DISPATCH(WidenF16), y, yStride, x, xStride, n);
}
void f32ToF16(void* y, int64_t yStride, const void* x, int64_t xStride, int64_t n) {
  fast<F16, float>(HWY_DYNAMIC_DISPATCH(NarrowF16), y, yStride, x, xStride, n);
}

template <typename T>
void same(void* yAny, int64_t yStride, const void* xAny, int64_t xStride, int64_t n) {
  T* y = static_cast<T*>(yAny);
  const T* x = static_cast<const T*>(xAny);
  if (yStride == 1 && xStride == 1) {
    std::memcpy(y, x, static_cast<size_t>(n) * sizeof(T));
  } else {
    for (int64_t i = 0; i < n; ++i) y[i * yStride] = x[i * xStride];
  }
}

template <typename From>
CastRow fromFloatType(DType to) {
  switch (to) {
    case DType::F32:
      return strided<float, From, Cast>;
    case DType::BF16:
      return strided<BF16, From, Cast>;
    case DType::F16:
      return strided<F16, From, Cast>;
    case DType::F64:
      return strided<double, From, Cast>;
    case DType::F8_E4M3:
      return strided<F8E4M3, From, Cast>;
    case DType::F8_E5M2:
      return strided<F8E5M2, From, Cast>;
    default:
      return nullptr;
  }
}

template <typename From>
CastRow fromIntType(DType to) {
  switch (to) {
    case DType::I64:
      return strided<int64_t, From, IntCast>;
    case DType::I32:
      return strided<int32_t, From, IntCast>;
    case DType::I16:
      return strided<int16_t, From, IntCast>;
    case DType::I8:
      return strided<int8_t, From, IntCast>;
    case DType::U64:
      return strided<uint64_t, From, IntCast>;
    case DType::U32:
      return strided<uint32_t, From, IntCast>;
    case DType::U16:
      return strided<uint16_t, From, IntCast>;
    case DType::U8:
      return strided<uint8_t, From, IntCast>;
    case DType::BOOL:
      return strided<Bool, From, IntCast>;
    default:
      return nullptr;
  }
}

}  // namespace

CastRow castRow(DType to, DType from) {
  if (to == from) {
    switch (dtypeBytes(to)) {
      case 1:
        return same<uint8_t>;
      case 2:
        return same<uint16_t>;
      case 4:
        return same<uint32_t>;
      default:
        return same<uint64_t>;
    }
  }
  if (to == DType::F32 && from == DType::BF16) return bf16ToF32;
  if (to == DType::BF16 && from == DType::F32) return f32ToBF16;
  if (to == DType::F32 && from == DType::F16) return f16ToF32;
  if (to == DType::F16 && from == DType::F32) return f32ToF16;
  switch (from) {
    case DType::F32:
      return fromFloatType<float>(to);
    case DType::BF16:
      return fromFloatType<BF16>(to);
    case DType::F16:
      return fromFloatType<F16>(to);
    case DType::F64:
      return fromFloatType<double>(to);
    case DType::F8_E4M3:
      return fromFloatType<F8E4M3>(to);
    case DType::F8_E5M2:
      return fromFloatType<F8E5M2>(to);
    case DType::I64:
      return fromIntType<int64_t>(to);
    case DType::I32:
      return fromIntType<int32_t>(to);
    case DType::I16:
      return fromIntType<int16_t>(to);
    case DType::I8:
      return fromIntType<int8_t>(to);
    case DType::U64:
      return fromIntType<uint64_t>(to);
    case DType::U32:
      return fromIntType<uint32_t>(to);
    case DType::U16:
      return fromIntType<uint16_t>(to);
    case DType::U8:
      return fromIntType<uint8_t>(to);
    case DType::BOOL:
      return fromIntType<Bool>(to);
  }
  return nullptr;
}

}  // namespace viaduct::cpu
#endif  // HWY_ONCE
