// What two parts of the keys gave a query becomes what all of them give: a warp a row of channels.
#include <cmath>

#include "../../attention_args.h"
#include "../../checks/ops.h"
#include "../cuda_backend.h"
#include "../launch.cuh"
#include "../numbers.cuh"

namespace viaduct::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = kThreads / kWarp;

template <int W, typename T>
__global__ void __launch_bounds__(kThreads) mergeKernel(AttentionMerge m) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRows;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp; n < m.count(); n += step) {
    const AttentionMerge::Row at = m.row(n);
    const float lse = m.lse[at.lse], partLse = m.partLse[at.lse];
    if (partLse == -INFINITY) continue;
    const float top = partLse > lse ? partLse : lse;
    const float old = lse == -INFINITY ? 0.0f : expf(lse - top), add = expf(partLse - top);
    const float sum = old + add, keep = old / sum, take = add / sum;
    float* out = static_cast<float*>(m.out.data) + at.out;
    const T* part = static_cast<const T*>(m.part.data) + at.part;
    for (int64_t c = lane * W; c < m.Dv; c += kWarp * W) {
      float a[W], b[W];
      widenAll(*reinterpret_cast<const Pack<float, W>*>(out + c), a);
      widenAll(*reinterpret_cast<const Pack<T, W>*>(part + c), b);
#pragma unroll
      for (int k = 0; k < W; ++k) a[k] = keep * a[k] + take * b[k];
      *reinterpret_cast<Pack<float, W>*>(out + c) = narrowAll<float>(a);
    }
    __syncwarp();
    if (lane == 0) m.lse[at.lse] = top + logf(sum);
  }
}

template <typename T>
void startMerge(const Launch& on, const AttentionMerge& m) {
  constexpr int kPack = kPackOf<float>;
  const bool packs = m.Dv % kPack == 0 && m.out.evenly(kPack) && m.part.evenly(kPack) &&
                     packable(static_cast<float*>(m.out.data), static_cast<T*>(m.part.data));
  on(packs ? mergeKernel<kPack, T> : mergeKernel<1, T>, on.blocksFor(m.count(), kRows), kThreads, m);
}

}  // namespace

void CudaBackend::mergeAttention(Stream& s, InOut out, InOut lse, In part, In partLse) {
  const AttentionMerge m = checkMergeAttention(out, lse, part, partLse);
  const Launch on(s);
  s.enqueue("mergeAttention",
            [=] { dispatchFloat(m.part.dtype, [&](auto zero) { startMerge<decltype(zero)>(on, m); }); });
}

namespace {
const Support support{{"mergeAttention", Takes::Float}};
}

}  // namespace viaduct::cuda
