// The op mergeAttention: what two parts of the keys gave a query becomes what all of them give.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/attention_merge.cc"
#include <cmath>
#include <limits>

#include "../attention_args.h"
#include "vectors.h"

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {
namespace {

template <typename T>
void MergeRows(const AttentionMerge& m) {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, m.Dv));
  parallelChunks(m.count(), grain, [&](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t n = begin; n < end; ++n) {
      const AttentionMerge::Row at = m.row(n);
      const float lse = m.lse[at.lse], partLse = m.partLse[at.lse];
      if (partLse == kNothing) continue;
      const float top = partLse > lse ? partLse : lse;
      const float old = lse == kNothing ? 0.0f : std::exp(lse - top), add = std::exp(partLse - top);
      const float sum = old + add;
      const V keep = Set(old / sum), take = Set(add / sum);
      float* out = static_cast<float*>(m.out.data) + at.out;
      const T* part = static_cast<const T*>(m.part.data) + at.part;
      ForVectors(m.Dv, [=](int64_t i, int64_t count) HWY_ATTR {
        Store(hn::MulAdd(take, Load(part + i, count), hn::Mul(keep, Load(out + i, count))), out + i, count);
      });
      m.lse[at.lse] = top + std::log(sum);
    }
  });
}

void MergeKernel(const AttentionMerge& m) {
  if (m.part.dtype == DType::F32) return MergeRows<float>(m);
  MergeRows<BF16>(m);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "../checks/ops.h"
#include "cpu_backend.h"

namespace viaduct::cpu {

HWY_EXPORT(MergeKernel);

void CpuBackend::mergeAttention(Stream& s, InOut out, InOut lse, In part, In partLse) {
  const AttentionMerge m = checkMergeAttention(out, lse, part, partLse);
  s.enqueue("mergeAttention", [m] { HWY_DYNAMIC_DISPATCH(MergeKernel)(m); });
}

}  // namespace viaduct::cpu
#endif  // HWY_ONCE
