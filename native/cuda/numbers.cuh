// Elements in kernels: storage types (float, BF16, F16 of ../half.h), packs of them that move 16 bytes at a time, and
// conversions. Kernels compute in float and touch memory through packs; what is stored rounds to nearest even.
#pragma once

#include <algorithm>
#include <type_traits>

#include "runtime.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../half.h"
#include "../tensor.h"

namespace viaduct::cuda {

/// W elements that load and store as one, or as several of 16 bytes. The address must be a multiple of its alignment.
template <typename T, int W>
struct alignas(sizeof(T) * W < 16 ? sizeof(T) * W : 16) Pack {
  T at[W];
};

/// float of an element.
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(BF16 x) { return floatOf(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float widen(F16 x) { return __half2float(__ushort_as_half(x.bits)); }

/// Element of a float, by the hardware's instruction: any NaN becomes the hardware's NaN. Casts that must have the CPU's bits
/// use fromFloat() of half.h.
template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ BF16 narrow<BF16>(float x) {
  return BF16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ F16 narrow<F16>(float x) {
  return F16{__half_as_ushort(__float2half_rn(x))};
}

/// The floats of a pack. By value: through a reference the compiler would load element by element.
template <typename T, int W>
__device__ __forceinline__ void widenAll(Pack<T, W> x, float (&y)[W]) {
#pragma unroll
  for (int k = 0; k < W; ++k) y[k] = widen(x.at[k]);
}

/// A pack of floats; two at a time where the hardware has an instruction for it.
template <typename T, int W>
__device__ __forceinline__ Pack<T, W> narrowAll(const float (&x)[W]) {
  Pack<T, W> y;
  if constexpr (W % 2 == 0 && sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < W; k += 2) {
      if constexpr (std::is_same_v<T, BF16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x[k], x[k + 1]);
        y.at[k].bits = __bfloat16_as_ushort(pair.x);
        y.at[k + 1].bits = __bfloat16_as_ushort(pair.y);
      } else {
        const __half2 pair = __floats2half2_rn(x[k], x[k + 1]);
        y.at[k].bits = __half_as_ushort(pair.x);
        y.at[k + 1].bits = __half_as_ushort(pair.y);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < W; ++k) y.at[k] = narrow<T>(x[k]);
  }
  return y;
}

/// Elements that 16 bytes hold of the smallest of the types.
template <typename... T>
constexpr int kPackOf = static_cast<int>(16 / std::min({sizeof(T)...}));

/// Whether packs may be read at all of these addresses.
template <typename... P>
bool packable(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

/// Calls f with a value of the storage type of a float dtype: dispatchFloat(x.dtype, [&](auto zero) { using T = decltype(zero); ... }).
template <typename F>
void dispatchFloat(DType dtype, F&& f) {
  if (dtype == DType::F32) return f(float{});
  if (dtype == DType::BF16) return f(BF16{});
  f(F16{});
}

}  // namespace viaduct::cuda
