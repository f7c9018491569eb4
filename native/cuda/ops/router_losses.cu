// What a router is trained by besides its choices, a warp a token; and noise on what it reads, by place.
#include "../../checks/ops.h"
#include "../../ids.h"
#include "../../philox.h"
#include "../cuda_backend.h"
#include "../launch.cuh"
#include "../numbers.cuh"
#include "../reduce.cuh"

namespace viaduct::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kRows = kThreads / kWarp;

struct Balance {
  int64_t rows, experts, first, tokens, perRun;
  float factor;
  bool normalize;
};

__global__ void __launch_bounds__(kThreads)
    balanceKernel(Balance b, float* dScores, float* losses, const float* scores, const float* counts) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRows;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp; i < b.rows; i += step) {
    const float* score = scores + i * b.experts;
    float* d = dScores + i * b.experts;
    if (b.first + i >= b.tokens) {
      for (int64_t e = lane; e < b.experts; e += kWarp) d[e] = 0;
      if (lane == 0) losses[i] = 0;
      continue;
    }
    const float* count = counts + (b.first + i) / b.perRun * b.experts;
    float mixed = 0, sum = 0;
    for (int64_t e = lane; e < b.experts; e += kWarp) {
      mixed += count[e] * score[e];
      sum += score[e];
    }
    mixed = warpSum(mixed);
    const float total = b.normalize ? warpSum(sum) + 1e-20f : 1.0f;
    const float loss = mixed / total, mean = b.normalize ? loss : 0.0f;
    for (int64_t e = lane; e < b.experts; e += kWarp) d[e] = b.factor * (count[e] - mean) / total;
    if (lane == 0) losses[i] = b.factor * loss;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    jitterKernel(T* y, const T* x, Ids samples, Ids positions, const int64_t* rng, uint32_t site, float eps, int64_t n,
                 int64_t columns) {
  const PhiloxKey key = philoxKey(rng[0], rng[1], kUseJitter);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    const int64_t row = i / columns;
    const uint32_t draw = drawAt(key, samples[row], positions[row], site, i - row * columns);
    const float u = static_cast<float>(draw) * 0x1p-32f;
    y[i] = narrow<T>(widen(x[i]) * (1.0f - eps + 2.0f * eps * u));
  }
}

}  // namespace

void CudaBackend::balanceScores(Stream& s, Out dScores, Out losses, In scores, In counts, int64_t first, int64_t tokens,
                                double factor, bool normalize) {
  checkBalanceScores(dScores, losses, scores, counts, first, tokens);
  const Launch on(s);
  const Balance b{scores.dim(0), scores.dim(1), first, tokens, tokens / counts.dim(0), static_cast<float>(factor),
                  normalize};
  s.enqueue("balanceScores", [=] {
    on(balanceKernel, on.blocksFor(b.rows, kRows), kThreads, b, dScores.as<float>(), losses.as<float>(),
       scores.as<float>(), counts.as<float>());
  });
}

void CudaBackend::jitter(Stream& s, Out y, In x, In rng, In sampleIds, In positions, int64_t site, double eps) {
  checkJitter(y, x, rng, sampleIds, positions, site, eps);
  const Launch on(s);
  s.enqueue("jitter", [=] {
    dispatchFloat(x.dtype, [&](auto zero) {
      using T = decltype(zero);
      on(jitterKernel<T>, on.blocksFor(x.numel(), kThreads), kThreads, y.as<T>(), x.as<T>(), Ids(sampleIds),
         Ids(positions), rng.as<int64_t>(), static_cast<uint32_t>(site), static_cast<float>(eps), x.numel(), x.dim(1));
    });
  });
}

namespace {
const Support support{{"balanceScores", Takes::Float32}, {"jitter", Takes::Float}};
}

}  // namespace viaduct::cuda
