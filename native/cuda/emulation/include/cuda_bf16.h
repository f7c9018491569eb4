// bfloat16 of the emulation: the conversions that kernels use, with the hardware's results. For tests alone.
#pragma once

#include "../../../half.h"

struct __nv_bfloat16 {
  unsigned short bits;
};

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) return {0x7fff};  // the hardware's only NaN
  return {viaduct::fromFloat<viaduct::BF16>(x).bits};
}
inline float __bfloat162float(__nv_bfloat16 x) { return viaduct::toFloat(viaduct::BF16{x.bits}); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return {x}; }

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
