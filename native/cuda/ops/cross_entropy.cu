// Cross entropy over a vocabulary that may be cut over ranks: statistics of this shard, their combination, the gradient. Logits
// are read once per pass and never copied; the gradient may be written over them. Rows are cut into pieces of fixed length, so
// that a token's bits do not depend on the tokens beside it.
#include "../../checks/ops.h"
#include "../../ids.h"
#include "../cuda_backend.h"
#include "../launch.cuh"
#include "../numbers.cuh"
#include "../reduce.cuh"

namespace viaduct::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kPiece = 32768;  // columns that a block takes
constexpr float kLowest = -INFINITY;

/// exp for sums and gradients of T: the hardware's short form is good to far more than the 16-bit types hold.
template <typename T>
__device__ __forceinline__ float expOf(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return expf(x);
  } else {
    return __expf(x);
  }
}

struct RowStats {
  float max;
  float sum;  // of exp(x - max)

  /// Adds W logits: one look for a new maximum, then the exponentials.
  template <typename T, int W>
  __device__ __forceinline__ void add(Pack<T, W> x) {
    float v[W], most = kLowest;
    widenAll(x, v);
#pragma unroll
    for (int k = 0; k < W; ++k) most = fmaxf(most, v[k]);
    if (most > max) {
      sum *= expOf<T>(max - most);
      max = most;
    }
    const float shift = max == kLowest ? 0.0f : max;  // all -inf so far: each term is exp(-inf), not exp(-inf + inf)
    float terms = 0;
#pragma unroll
    for (int k = 0; k < W; ++k) terms += expOf<T>(v[k] - shift);
    sum += terms;
  }
};

/// pieces[row, p] = statistics of the p-th piece of a row.
template <int W, typename T>
__global__ void __launch_bounds__(kThreads)
    pieceStatsKernel(RowStats* pieces, const T* logits, int64_t stride, int64_t valid, int count) {
  const int64_t row = blockIdx.x / count, begin = blockIdx.x % count * kPiece;
  const int size = static_cast<int>(min(kPiece, valid - begin)), packs = size / W;
  const T* x = logits + row * stride + begin;
  RowStats own{kLowest, 0};
#pragma unroll 4
  for (int i = threadIdx.x; i < packs; i += kThreads) own.add(reinterpret_cast<const Pack<T, W>*>(x)[i]);
  for (int i = packs * W + threadIdx.x; i < size; i += kThreads) own.add(Pack<T, 1>{{x[i]}});
  const float max = blockMax<kThreads>(own.max);
  const float sum = blockSum<kThreads>(own.max == max ? own.sum : own.sum * expf(own.max - max));
  if (threadIdx.x == 0) pieces[blockIdx.x] = {max, sum};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    joinPiecesKernel(float* stats, const RowStats* pieces, const T* logits, Ids labels, int64_t stride, int64_t tokens,
                     int64_t vocabStart, int64_t valid, int count) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= tokens) return;
  float max = kLowest;
  for (int p = 0; p < count; ++p) max = fmaxf(max, pieces[t * count + p].max);
  double sum = 0;
  for (int p = 0; p < count; ++p) {
    const RowStats piece = pieces[t * count + p];
    sum += piece.max == max ? piece.sum : piece.sum * exp(static_cast<double>(piece.max) - max);
  }
  const int64_t label = labels[t], column = label - vocabStart;
  const bool here = label != kIgnoredLabel && column >= 0 && column < valid;
  stats[t] = max;
  stats[tokens + t] = static_cast<float>(sum);
  stats[2 * tokens + t] = here ? widen(logits[t * stride + column]) : 0.0f;
}

__global__ void __launch_bounds__(kThreads)
    combineKernel(float* lse, float* loss, const float* stats, Ids labels, int64_t shards, int64_t tokens) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= tokens) return;
  const float* first = stats + t;
  float max = kLowest;
  for (int64_t p = 0; p < shards; ++p) max = fmaxf(max, first[p * 3 * tokens]);
  double sum = 0, own = 0;
  for (int64_t p = 0; p < shards; ++p) {
    const float* shard = first + p * 3 * tokens;
    const float shardSum = shard[tokens];
    // A shard of padding alone has max = -inf and sum = 0; a NaN sum must pass.
    sum += shard[0] == max || shardSum == 0 ? shardSum : shardSum * exp(static_cast<double>(shard[0]) - max);
    own += shard[2 * tokens];
  }
  const double logSum = log(sum);
  lse[t] = static_cast<float>(max + logSum);
  loss[t] = labels[t] == kIgnoredLabel ? 0.0f : static_cast<float>(max - own + logSum);
}

template <typename T>
struct GradientArgs {
  T* dLogits;
  const T* logits;
  const float* lse;
  const float* dLoss;
  Ids labels;
  bool onePerToken;
  int count;  // pieces of a row
  int64_t dStride, stride, columns, valid, vocabStart;
};

/// Of W logits, of which the first `count` are not padding and `own` is the label's, if it is one of them.
template <typename T, int W>
__device__ __forceinline__ Pack<T, W> gradientOf(Pack<T, W> logits, float lse, float dLoss, int count, int own) {
  float x[W], y[W];
  widenAll(logits, x);
#pragma unroll
  for (int k = 0; k < W; ++k) y[k] = k < count ? expOf<T>(x[k] - lse) * dLoss : 0.0f;
  if (own >= 0 && own < W) {
    float logit = 0;
#pragma unroll
    for (int k = 0; k < W; ++k) logit = k == own ? x[k] : logit;
    const float gradient = expm1f(logit - lse) * dLoss;  // q - 1 without cancellation
#pragma unroll
    for (int k = 0; k < W; ++k) y[k] = k == own ? gradient : y[k];
  }
  return narrowAll<T>(y);
}

template <int W, typename T>
__global__ void __launch_bounds__(kThreads) gradientKernel(GradientArgs<T> a) {
  const int64_t row = blockIdx.x / a.count, begin = blockIdx.x % a.count * kPiece;
  const int size = static_cast<int>(min(kPiece, a.columns - begin)), packs = size / W;
  const int64_t label = a.labels[row], at = label - a.vocabStart - begin;
  const float dLoss = a.dLoss[a.onePerToken ? row : 0], lse = a.lse[row];
  const bool none = label == kIgnoredLabel || dLoss == 0;
  const int stop = none ? 0 : static_cast<int>(max(int64_t{0}, min(static_cast<int64_t>(size), a.valid - begin)));
  const int own = at >= 0 && at < stop ? static_cast<int>(at) : -W;  // the label's column in this piece
  T* y = a.dLogits + row * a.dStride + begin;
  const T* x = a.logits + row * a.stride + begin;
#pragma unroll 4
  for (int i = threadIdx.x; i < packs; i += kThreads) {
    Pack<T, W> result{};
    const int c = i * W;
    if (c < stop) result = gradientOf(reinterpret_cast<const Pack<T, W>*>(x)[i], lse, dLoss, stop - c, own - c);
    reinterpret_cast<Pack<T, W>*>(y)[i] = result;
  }
  for (int c = packs * W + threadIdx.x; c < size; c += kThreads) {
    y[c] = c < stop ? gradientOf(Pack<T, 1>{{x[c]}}, lse, dLoss, 1, own - c).at[0] : T{};
  }
}

int piecesOf(int64_t columns) { return static_cast<int>((columns + kPiece - 1) / kPiece); }
unsigned blocksOfTokens(int64_t tokens) { return static_cast<unsigned>((tokens + kThreads - 1) / kThreads); }

}  // namespace

void CudaBackend::crossEntropyStats(Stream& s, Out stats, In logits, In labels, int64_t vocabStart, int64_t vocabSize) {
  const int64_t valid = checkCrossEntropyStats(stats, logits, labels, vocabStart, vocabSize);
  const int64_t tokens = logits.dim(0), stride = logits.stride[0];
  const int count = piecesOf(valid);
  const Scratch scratch(*this, s, static_cast<size_t>(tokens * count) * sizeof(RowStats));
  const Launch on(s);
  s.enqueue("crossEntropyStats", [=, pieces = scratch.as<RowStats>()] {
    dispatchFloat(logits.dtype, [&](auto zero) {
      using T = decltype(zero);
      constexpr int kPack = kPackOf<T>;
      const T* x = logits.as<T>();
      const bool packs = packable(x) && stride % kPack == 0;
      on(packs ? pieceStatsKernel<kPack, T> : pieceStatsKernel<1, T>, static_cast<unsigned>(tokens * count), kThreads,
         pieces, x, stride, valid, count);
      on(joinPiecesKernel<T>, blocksOfTokens(tokens), kThreads, stats.as<float>(), pieces, x, Ids(labels), stride,
         tokens, vocabStart, valid, count);
    });
  });
}

void CudaBackend::crossEntropyCombine(Stream& s, Out lse, Out loss, In stats, In labels) {
  checkCrossEntropyCombine(lse, loss, stats, labels);
  const Launch on(s);
  s.enqueue("crossEntropyCombine", [=] {
    const int64_t shards = stats.dim(0), tokens = stats.dim(2);
    on(combineKernel, blocksOfTokens(tokens), kThreads, lse.as<float>(), loss.as<float>(), stats.as<float>(),
       Ids(labels), shards, tokens);
  });
}

void CudaBackend::crossEntropyBackward(Stream& s, Out dLogits, In logits, In lse, In labels, In dLoss,
                                       int64_t vocabStart, int64_t vocabSize) {
  const int64_t valid = checkCrossEntropyBackward(dLogits, logits, lse, labels, dLoss, vocabStart, vocabSize);
  const Launch on(s);
  s.enqueue("crossEntropyBackward", [=] {
    dispatchFloat(logits.dtype, [&](auto zero) {
      using T = decltype(zero);
      constexpr int kPack = kPackOf<T>;
      const int count = piecesOf(logits.dim(1));
      const GradientArgs<T> a{dLogits.as<T>(),  logits.as<T>(),      lse.as<float>(), dLoss.as<float>(),
                              Ids(labels),      !isOneNumber(dLoss), count,           dLogits.stride[0],
                              logits.stride[0], logits.dim(1),       valid,           vocabStart};
      const bool packs = packable(a.dLogits, a.logits) && a.dStride % kPack == 0 && a.stride % kPack == 0;
      on(packs ? gradientKernel<kPack, T> : gradientKernel<1, T>, static_cast<unsigned>(logits.dim(0) * count),
         kThreads, a);
    });
  });
}

namespace {
const Support support{{"crossEntropyStats", Takes::Float},
                      {"crossEntropyCombine", Takes::Float32},
                      {"crossEntropyBackward", Takes::Float}};
}

}  // namespace viaduct::cuda
