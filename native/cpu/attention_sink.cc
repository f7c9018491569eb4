// The ops attentionSink and attentionSinkBackward: one more term of each head's softmax.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/attention_sink.cc"
#include <cmath>
#include <limits>

#include "../attention_args.h"
#include "vectors.h"

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {
namespace {

float SinkOf(const AttentionSink& a, int64_t n) {
  const int64_t head = a.head(n);
  return a.sinkDtype == DType::F32 ? static_cast<const float*>(a.sink)[head]
                                   : toFloat(static_cast<const BF16*>(a.sink)[head]);
}

template <typename F>
void ForRows(const AttentionSink& a, F f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, a.Dv));
  parallelChunks(a.count(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) f(n, a.row(n));
  });
}

template <typename T>
void SinkRows(const AttentionSink& a) {
  ForRows(a, [&](int64_t n, AttentionMerge::Row at) HWY_ATTR {
    const float lse = a.lse[at.lse], sink = SinkOf(a, n);
    const float top = sink > lse ? sink : lse;
    if (top == -std::numeric_limits<float>::infinity()) return;
    const float seen = std::exp(lse - top), sum = seen + std::exp(sink - top);
    const V keep = Set(seen / sum);
    T* out = static_cast<T*>(a.out.data) + at.out;
    ForVectors(a.Dv,
               [=](int64_t i, int64_t count) HWY_ATTR { Store(hn::Mul(keep, Load(out + i, count)), out + i, count); });
    a.lse[at.lse] = top + std::log(sum);
  });
}

template <typename T>
void SinkGradients(const AttentionSink& a) {
  ForRows(a, [&](int64_t n, AttentionMerge::Row at) HWY_ATTR {
    const T* out = static_cast<const T*>(a.out.data) + at.out;
    const T* dOut = static_cast<const T*>(a.part.data) + at.part;
    const double dot = SumVectors(
        a.Dv, [=](int64_t i, int64_t count) HWY_ATTR { return hn::Mul(Load(out + i, count), Load(dOut + i, count)); });
    const float lse = a.lse[at.lse];
    const bool nothing = lse == -std::numeric_limits<float>::infinity();
    a.rows[n] = nothing ? 0.0f : -std::exp(SinkOf(a, n) - lse) * static_cast<float>(dot);
  });
}

void SinkKernel(const AttentionSink& a) {
  if (a.out.dtype == DType::F32) return SinkRows<float>(a);
  SinkRows<BF16>(a);
}

void SinkBackwardKernel(const AttentionSink& a) {
  if (a.out.dtype == DType::F32) return SinkGradients<float>(a);
  SinkGradients<BF16>(a);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "../checks/ops.h"
#include "cpu_backend.h"

namespace viaduct::cpu {

HWY_EXPORT(SinkKernel);
HWY_EXPORT(SinkBackwardKernel);

void CpuBackend::attentionSink(Stream& s, InOut out, InOut lse, In sink) {
  const AttentionSink a = checkAttentionSink("attentionSink", out, lse, sink);
  s.enqueue("attentionSink", [a] { HWY_DYNAMIC_DISPATCH(SinkKernel)(a); });
}

void CpuBackend::attentionSinkBackward(Stream& s, Out rows, In dOut, In out, In lse, In sink) {
  const AttentionSink a = checkAttentionSinkBackward(rows, dOut, out, lse, sink);
  s.enqueue("attentionSinkBackward", [a] { HWY_DYNAMIC_DISPATCH(SinkBackwardKernel)(a); });
}

}  // namespace viaduct::cpu
#endif  // HWY_ONCE
