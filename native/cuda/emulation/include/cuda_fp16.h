// float16 of the emulation: the conversions that kernels use, with the hardware's results. For tests alone.
#pragma once

#include "../../../half.h"

struct __half {
  unsigned short bits;
};

inline __half __float2half_rn(float x) {
  if (x != x) return {0x7fff};  // the hardware's only NaN
  return {viaduct::fromFloat<viaduct::F16>(x).bits};
}
inline float __half2float(__half x) { return viaduct::toFloat(viaduct::F16{x.bits}); }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short x) { return {x}; }

struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
