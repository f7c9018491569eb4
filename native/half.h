// The 16-bit and 8-bit floats as storage types, and their scalar conversions. Every narrowing rounds to nearest even; a
// NaN stays a quiet NaN (bfloat16: 0x7FC0; float16: payload kept, as the hardware does). The vector forms in vectors.h
// and cast.cc agree bit for bit.
#pragma once

#include <cstdint>
#include <cstring>

// Functions that both the host and a device's kernels call.
#ifdef __CUDACC__
#define VIADUCT_HOST_DEVICE __host__ __device__
#else
#define VIADUCT_HOST_DEVICE
#endif

namespace viaduct {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
struct F8E4M3 {
  uint8_t bits;
};
struct F8E5M2 {
  uint8_t bits;
};

VIADUCT_HOST_DEVICE inline uint32_t bitsOf(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
VIADUCT_HOST_DEVICE inline float floatOf(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

VIADUCT_HOST_DEVICE inline float toFloat(float x) { return x; }
VIADUCT_HOST_DEVICE inline float toFloat(BF16 x) { return floatOf(static_cast<uint32_t>(x.bits) << 16); }
VIADUCT_HOST_DEVICE inline float toFloat(F16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) {  // infinity, or a NaN that becomes quiet
    const uint32_t payload = (magnitude & 0x3ff) << 13;
    return floatOf(sign | 0x7f800000u | (payload ? 0x400000u | payload : 0u));
  }
  if (magnitude >= 0x400) return floatOf(sign | ((magnitude << 13) + 0x38000000u));
  return floatOf(sign | bitsOf(static_cast<float>(magnitude) * 0x1p-24f));
}
VIADUCT_HOST_DEVICE inline float toFloat(F8E5M2 x) { return toFloat(F16{static_cast<uint16_t>(x.bits << 8)}); }
VIADUCT_HOST_DEVICE inline float toFloat(F8E4M3 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x80) << 24;
  const uint32_t magnitude = x.bits & 0x7f;
  if (magnitude == 0x7f) return floatOf(sign | 0x7ff00000u);  // no infinities in this format
  if (magnitude >= 8) return floatOf(sign | ((magnitude << 20) + (120u << 23)));
  return floatOf(sign | bitsOf(static_cast<float>(magnitude) * 0x1p-9f));
}
VIADUCT_HOST_DEVICE inline float toFloat(double x) { return static_cast<float>(x); }

template <typename T>
VIADUCT_HOST_DEVICE T fromFloat(float x);
template <>
VIADUCT_HOST_DEVICE inline float fromFloat<float>(float x) {
  return x;
}
template <>
VIADUCT_HOST_DEVICE inline double fromFloat<double>(float x) {
  return x;
}
template <>
VIADUCT_HOST_DEVICE inline BF16 fromFloat<BF16>(float x) {
  const uint32_t u = bitsOf(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return BF16{0x7fc0};
  return BF16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
template <>
VIADUCT_HOST_DEVICE inline F16 fromFloat<F16>(float x) {
  const uint32_t u = bitsOf(x);
  const uint32_t sign = (u >> 16) & 0x8000;
  const uint32_t a = u & 0x7fffffffu;
  uint32_t h;
  if (a > 0x7f800000u) {
    h = 0x7e00 | ((a >> 13) & 0x3ff);
  } else if (a >= 0x47800000u) {
    h = 0x7c00;
  } else if (a >= 0x38800000u) {
    h = (a + 0xfffu + ((a >> 13) & 1) - 0x38000000u) >> 13;
  } else {
    h = bitsOf(floatOf(a) + 0.5f) - 0x3f000000u;  // one unit of [0.5, 1) is the smallest float16: the addition rounds
  }
  return F16{static_cast<uint16_t>(sign | h)};
}
template <>
VIADUCT_HOST_DEVICE inline F8E5M2 fromFloat<F8E5M2>(float x) {
  const uint32_t u = bitsOf(x);
  const uint32_t sign = (u >> 24) & 0x80;
  const uint32_t a = u & 0x7fffffffu;
  uint32_t h;
  if (a > 0x7f800000u) {
    h = 0x7f;
  } else if (a >= 0x47800000u) {
    h = 0x7c;
  } else if (a >= 0x38800000u) {
    h = (a + 0xfffffu + ((a >> 21) & 1) - 0x38000000u) >> 21;
  } else {
    h = bitsOf(floatOf(a) + 128.0f) - 0x43000000u;
  }
  return F8E5M2{static_cast<uint8_t>(sign | h)};
}
/// Too large becomes the largest finite value, 448, as PyTorch does it.
template <>
VIADUCT_HOST_DEVICE inline F8E4M3 fromFloat<F8E4M3>(float x) {
  const uint32_t u = bitsOf(x);
  const uint32_t sign = (u >> 24) & 0x80;
  const uint32_t a = u & 0x7fffffffu;
  uint32_t h;
  if (a > 0x7f800000u) {
    h = 0x7f;
  } else if (a >= 0x43f00000u) {
    h = 0x7e;
  } else if (a >= 0x3c800000u) {
    h = (a + 0x7ffffu + ((a >> 20) & 1) - (120u << 23)) >> 20;
    if (h > 0x7e) h = 0x7e;
  } else {
    h = bitsOf(floatOf(a) + 16384.0f) - 0x46800000u;
  }
  return F8E4M3{static_cast<uint8_t>(sign | h)};
}

}  // namespace viaduct
