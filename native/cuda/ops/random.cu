// Dropout and normal numbers by place, of the CPU's counters (cpu/random.cc says which). Dropout keeps and drops what the CPU does,
// to the bit; normal numbers are computed in F64 as there, by other functions.
#include "../../checks/ops.h"
#include "../../ids.h"
#include "../../philox.h"
#include "../cuda_backend.h"
#include "../launch.cuh"
#include "../numbers.cuh"

namespace viaduct::cuda {

namespace {

constexpr int kThreads = 256;

struct DropoutPlaces {
  Ids samples, positions;
  const int64_t* rng;  // seed, step
  uint32_t site;
  int64_t channelStart;
  uint32_t threshold;  // draws below are dropped
  float scale;
};

/// A thread has W channels of a row at a time, of one counter where W is 4 and they begin at a multiple of 4, else one each.
template <int W, typename T>
__global__ void __launch_bounds__(kThreads)
    dropoutKernel(T* y, const T* x, DropoutPlaces p, int64_t packs, int64_t packsOfRow) {
  const PhiloxKey key = philoxKey(p.rng[0], p.rng[1], kUseDropout);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < packs; i += step) {
    const int64_t row = i / packsOfRow, channel = p.channelStart + (i - row * packsOfRow) * W;
    const uint64_t sample = static_cast<uint64_t>(p.samples[row]);
    float v[W];
    widenAll(reinterpret_cast<const Pack<T, W>*>(x)[i], v);
#pragma unroll
    for (int q = 0; q < W; q += 4) {
      const PhiloxBlock draws =
          philox({{static_cast<uint32_t>((channel + q) / 4), static_cast<uint32_t>(p.positions[row]),
                   static_cast<uint32_t>(sample), p.site | static_cast<uint32_t>(sample >> 32) << 16}},
                 key);
#pragma unroll
      for (int k = 0; k < (W < 4 ? W : 4); ++k) {
        const uint32_t draw = draws.word[W < 4 ? channel % 4 : k];
        v[q + k] = draw < p.threshold ? 0.0f : v[q + k] * p.scale;
      }
    }
    reinterpret_cast<Pack<T, W>*>(y)[i] = narrowAll<T>(v);
  }
}

/// Logical places of a tensor's elements, and where they lie.
struct NormalPlaces {
  int dims;
  int64_t size[kMaxDims], stride[kMaxDims], start[kMaxDims], logicalStride[kMaxDims];
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    normalKernel(T* y, NormalPlaces places, int64_t n, PhiloxKey key, double mean, double std) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    int64_t rest = i, at = 0, logical = 0;
    for (int d = places.dims - 1; d >= 0; --d) {
      const int64_t index = rest % places.size[d];
      rest /= places.size[d];
      at += index * places.stride[d];
      logical += (places.start[d] + index) * places.logicalStride[d];
    }
    const uint64_t block = static_cast<uint64_t>(logical) >> 2;
    const PhiloxBlock b = philox({{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 0}}, key);
    const bool second = (logical & 2) != 0;
    const double uniform = (static_cast<double>(second ? b.word[2] : b.word[0]) + 1.0) * 0x1p-32;  // in (0, 1]
    const double angle =
        static_cast<double>(second ? b.word[3] : b.word[1]) * (0x1p-32 * 6.283185307179586476925286766559);
    const double radius = sqrt(-2.0 * log(uniform));
    const double number = radius * ((logical & 1) != 0 ? sin(angle) : cos(angle));
    y[at] = fromFloat<T>(static_cast<float>(mean + std * number));
  }
}

}  // namespace

void CudaBackend::dropout(Stream& s, Out y, In x, In rng, In sampleIds, In positions, int64_t site,
                          int64_t channelStart, double p) {
  checkDropout(y, x, rng, sampleIds, positions, site, channelStart, p);
  const int64_t columns = x.dim(1), n = x.numel();
  if (n == 0) return;
  const Launch on(s);
  const DropoutPlaces places{Ids(sampleIds),
                             Ids(positions),
                             rng.as<const int64_t>(),
                             static_cast<uint32_t>(site),
                             channelStart,
                             static_cast<uint32_t>(std::min(std::floor(p * 0x1p32 + 0.5), 0x1p32 - 1)),
                             static_cast<float>(1.0 / (1.0 - p))};
  s.enqueue("dropout", [=] {
    dispatchFloat(x.dtype, [&](auto zero) {
      using T = decltype(zero);
      constexpr int kPack = kPackOf<T>;
      T* to = y.as<T>();
      const T* from = x.as<const T>();
      if (packable(to, from) && columns % kPack == 0 && channelStart % 4 == 0) {
        on(dropoutKernel<kPack, T>, on.blocksFor(n, kThreads * kPack), kThreads, to, from, places, n / kPack,
           columns / kPack);
      } else {
        on(dropoutKernel<1, T>, on.blocksFor(n, kThreads), kThreads, to, from, places, n, columns);
      }
    });
  });
}

void CudaBackend::randomNormal(Stream& s, Out y, int64_t seed, int64_t nameHash, Dims start, Dims logicalStride,
                               double mean, double std) {
  checkRandomNormal(y, start, logicalStride);
  const int64_t n = y.numel();
  if (n == 0) return;
  NormalPlaces places{};
  places.dims = y.ndim;
  for (int d = 0; d < y.ndim; ++d) {
    places.size[d] = y.shape[d];
    places.stride[d] = y.stride[d];
    places.start[d] = start.v[d];
    places.logicalStride[d] = logicalStride.v[d];
  }
  const Launch on(s);
  s.enqueue("randomNormal", [=] {
    const PhiloxKey key = philoxKey(seed, nameHash, kUseNormal);
    dispatchFloat(y.dtype, [&](auto zero) {
      using T = decltype(zero);
      on(normalKernel<T>, on.blocksFor(n, kThreads), kThreads, y.as<T>(), places, n, key, mean, std);
    });
  });
}

namespace {
const Support support{{"dropout", Takes::Float}, {"randomNormal", Takes::Float}};
}

}  // namespace viaduct::cuda
