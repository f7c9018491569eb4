// Rotary position embedding, in place, on heads of any stride: a block takes a token, its threads packs of channels. Computed in
// F32 and rounded once. A token whose position has no row in the tables becomes NaN: on the host it would be an error.
#include "../../checks/ops.h"
#include "../../ids.h"
#include "../cuda_backend.h"
#include "../numbers.cuh"
#include "../rows.cuh"

namespace viaduct::cuda {

namespace {

constexpr int kThreads = 128;

struct Table {
  const float *cos, *sin;
  int64_t cosStride, sinStride;
  int64_t rows;
  int half;  // R / 2
  float sign;
};

template <int W, typename T>
__device__ __forceinline__ void loadPack(const T* from, float (&v)[W]) {
  widenAll(*reinterpret_cast<const Pack<T, W>*>(from), v);
}

/// Channels [i, i + W) of a head, with those half a rotation further.
template <int W, typename T>
__device__ void rotateHalves(T* x, int i, const float* cos, const float* sin, const Table& table) {
  float a[W], b[W], c[W], s[W], first[W], second[W];
  loadPack(x + i, a);
  loadPack(x + table.half + i, b);
  loadPack(cos + i, c);
  loadPack(sin + i, s);
#pragma unroll
  for (int k = 0; k < W; ++k) {
    const float turn = s[k] * table.sign;
    first[k] = a[k] * c[k] - b[k] * turn;
    second[k] = b[k] * c[k] + a[k] * turn;
  }
  *reinterpret_cast<Pack<T, W>*>(x + i) = narrowAll<T>(first);
  *reinterpret_cast<Pack<T, W>*>(x + table.half + i) = narrowAll<T>(second);
}

/// The W pairs of channels from pair i on. One pair is no pack: heads may begin anywhere.
template <int W, typename T>
__device__ void rotatePairs(T* x, int i, const float* cos, const float* sin, const Table& table) {
  float v[2 * W], c[W], s[W], y[2 * W];
  if constexpr (W == 1) {
    v[0] = widen(x[2 * i]);
    v[1] = widen(x[2 * i + 1]);
  } else {
    loadPack(x + 2 * i, v);
  }
  loadPack(cos + i, c);
  loadPack(sin + i, s);
#pragma unroll
  for (int k = 0; k < W; ++k) {
    const float turn = s[k] * table.sign;
    y[2 * k] = v[2 * k] * c[k] - v[2 * k + 1] * turn;
    y[2 * k + 1] = v[2 * k + 1] * c[k] + v[2 * k] * turn;
  }
  if constexpr (W == 1) {
    x[2 * i] = narrow<T>(y[0]);
    x[2 * i + 1] = narrow<T>(y[1]);
  } else {
    *reinterpret_cast<Pack<T, 2 * W>*>(x + 2 * i) = narrowAll<T>(y);
  }
}

/// A thread has W pairs of channels at a time.
template <int W, bool kInterleaved, typename T>
__global__ void __launch_bounds__(kThreads)
    ropeKernel(T* x, int64_t tokenStride, RowPlaces heads, int64_t headCount, Ids positions, Table table) {
  const int64_t t = blockIdx.x, position = positions[t];
  const bool known = position >= 0 && position < table.rows;
  const float* cos = table.cos + (known ? position : 0) * table.cosStride;
  const float* sin = table.sin + (known ? position : 0) * table.sinStride;
  const int packs = table.half / W;
  for (int64_t item = threadIdx.x; item < headCount * packs; item += kThreads) {
    const int64_t head = item / packs;
    const int i = static_cast<int>(item - head * packs) * W;
    T* at = x + t * tokenStride + heads[head];
    if (!known) {
      for (int k = 0; k < W; ++k) {
        const T nan = narrow<T>(__uint_as_float(0x7fc00000u));
        at[kInterleaved ? 2 * (i + k) : i + k] = nan;
        at[kInterleaved ? 2 * (i + k) + 1 : table.half + i + k] = nan;
      }
    } else if constexpr (kInterleaved) {
      rotatePairs<W>(at, i, cos, sin, table);
    } else {
      rotateHalves<W>(at, i, cos, sin, table);
    }
  }
}

}  // namespace

void CudaBackend::rope(Stream& s, InOut x, In cos, In sin, In positions, bool interleaved, bool inverse) {
  checkRope(x, cos, sin, positions);
  if (x.numel() == 0 || cos.dim(1) == 0) return;
  const Launch on(s);
  s.enqueue("rope", [=] {
    const RowPlaces heads(x, 1, x.ndim - 1);
    const Table table{cos.as<const float>(),        sin.as<const float>(), cos.stride[0], sin.stride[0], cos.dim(0),
                      static_cast<int>(cos.dim(1)), inverse ? -1.0f : 1.0f};
    const auto start = [&](auto kernel, auto* data) {
      on(kernel, static_cast<unsigned>(x.dim(0)), kThreads, data, x.stride[0], heads, heads.count(), Ids(positions),
         table);
    };
    dispatchFloat(x.dtype, [&](auto zero) {
      using T = decltype(zero);
      constexpr int kPack = kPackOf<T>;
      T* data = x.as<T>();
      const bool rows = packable(data, table.cos, table.sin) && x.stride[0] % kPack == 0 && heads.multiplesOf(kPack) &&
                        table.cosStride % 4 == 0 && table.sinStride % 4 == 0;
      if (interleaved) {
        constexpr int W = kPack / 2;
        rows&& table.half % W == 0 ? start(ropeKernel<W, true, T>, data) : start(ropeKernel<1, true, T>, data);
      } else {
        rows&& table.half % kPack == 0 ? start(ropeKernel<kPack, false, T>, data)
                                       : start(ropeKernel<1, false, T>, data);
      }
    });
  });
}

namespace {
const Support support{{"rope", Takes::Float}};
}

}  // namespace viaduct::cuda
