// One more term of each head's softmax, a sink, and its gradient: a warp a row of channels.
#include <cmath>

#include "../../attention_args.h"
#include "../../checks/ops.h"
#include "../cuda_backend.h"
#include "../launch.cuh"
#include "../numbers.cuh"
#include "../reduce.cuh"

namespace viaduct::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = kThreads / kWarp;

template <typename S>
__device__ __forceinline__ float sinkOf(const AttentionSink& a, int64_t n) {
  return widen(static_cast<const S*>(a.sink)[a.head(n)]);
}

template <int W, typename T, typename S>
__global__ void __launch_bounds__(kThreads) sinkKernel(AttentionSink a) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRows;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp; n < a.count(); n += step) {
    const AttentionMerge::Row at = a.row(n);
    const float lse = a.lse[at.lse], sink = sinkOf<S>(a, n);
    const float top = sink > lse ? sink : lse;
    if (top == -INFINITY) continue;
    const float seen = expf(lse - top), sum = seen + expf(sink - top), keep = seen / sum;
    T* out = static_cast<T*>(a.out.data) + at.out;
    for (int64_t c = lane * W; c < a.Dv; c += kWarp * W) {
      float x[W];
      widenAll(*reinterpret_cast<const Pack<T, W>*>(out + c), x);
#pragma unroll
      for (int k = 0; k < W; ++k) x[k] *= keep;
      *reinterpret_cast<Pack<T, W>*>(out + c) = narrowAll<T>(x);
    }
    __syncwarp();
    if (lane == 0) a.lse[at.lse] = top + logf(sum);
  }
}

template <int W, typename T, typename S>
__global__ void __launch_bounds__(kThreads) sinkBackwardKernel(AttentionSink a) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRows;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp; n < a.count(); n += step) {
    const AttentionMerge::Row at = a.row(n);
    const T* out = static_cast<const T*>(a.out.data) + at.out;
    const T* dOut = static_cast<const T*>(a.part.data) + at.part;
    float dot = 0;
    for (int64_t c = lane * W; c < a.Dv; c += kWarp * W) {
      float x[W], y[W];
      widenAll(*reinterpret_cast<const Pack<T, W>*>(out + c), x);
      widenAll(*reinterpret_cast<const Pack<T, W>*>(dOut + c), y);
#pragma unroll
      for (int k = 0; k < W; ++k) dot += x[k] * y[k];
    }
    dot = warpSum(dot);
    const float lse = a.lse[at.lse];
    if (lane == 0) a.rows[n] = lse == -INFINITY ? 0.0f : -expf(sinkOf<S>(a, n) - lse) * dot;
  }
}

template <typename T, typename S>
void startSink(const Launch& on, const AttentionSink& a) {
  constexpr int kPack = kPackOf<T>;
  const bool packs = a.Dv % kPack == 0 && a.out.evenly(kPack) && packable(static_cast<T*>(a.out.data));
  on(packs ? sinkKernel<kPack, T, S> : sinkKernel<1, T, S>, on.blocksFor(a.count(), kRows), kThreads, a);
}

template <typename T, typename S>
void startSinkBackward(const Launch& on, const AttentionSink& a) {
  constexpr int kPack = kPackOf<T>;
  const bool packs = a.Dv % kPack == 0 && a.out.evenly(kPack) && a.part.evenly(kPack) &&
                     packable(static_cast<T*>(a.out.data), static_cast<T*>(a.part.data));
  on(packs ? sinkBackwardKernel<kPack, T, S> : sinkBackwardKernel<1, T, S>, on.blocksFor(a.count(), kRows), kThreads,
     a);
}

/// Calls f with a zero of out's type and one of the sink's.
template <typename F>
void dispatchBoth(const AttentionSink& a, F f) {
  dispatchFloat(a.out.dtype, [&](auto zero) { dispatchFloat(a.sinkDtype, [&](auto sinkZero) { f(zero, sinkZero); }); });
}

}  // namespace

void CudaBackend::attentionSink(Stream& s, InOut out, InOut lse, In sink) {
  const AttentionSink a = checkAttentionSink("attentionSink", out, lse, sink);
  const Launch on(s);
  s.enqueue("attentionSink", [=] {
    dispatchBoth(a, [&](auto zero, auto sinkZero) { startSink<decltype(zero), decltype(sinkZero)>(on, a); });
  });
}

void CudaBackend::attentionSinkBackward(Stream& s, Out rows, In dOut, In out, In lse, In sink) {
  const AttentionSink a = checkAttentionSinkBackward(rows, dOut, out, lse, sink);
  const Launch on(s);
  s.enqueue("attentionSinkBackward", [=] {
    dispatchBoth(a, [&](auto zero, auto sinkZero) { startSinkBackward<decltype(zero), decltype(sinkZero)>(on, a); });
  });
}

namespace {
const Support support{{"attentionSink", Takes::Float}, {"attentionSinkBackward", Takes::Float}};
}

}  // namespace viaduct::cuda
