// Argmax over the last dim: the first of the largest, a NaN above everything, as PyTorch has it. Long rows are cut
// into pieces of fixed length, so that one token's logits keep all threads busy.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/sampling.cc"
#include "scratch.h"
#include "vectors.h"

#ifndef VIADUCT_CPU_SAMPLING
#define VIADUCT_CPU_SAMPLING
#include <cmath>
#include <limits>
namespace viaduct::cpu {

constexpr int64_t kArgmaxPiece = 16384;

struct Largest {
  int64_t index;
  float value;
};

}  // namespace viaduct::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {
namespace {

// Finds the value with vectors, then the place of its first appearance.
template <typename T>
Largest LargestOf(const T* x, int64_t size) {
  V max = Set(-std::numeric_limits<float>::infinity());
  V nan = Zero();
  const V filler = Set(toFloat(x[0]));  // for the lanes past the end
  ForVectors(size, [&](int64_t i, int64_t n) HWY_ATTR {
    V v = Load(x + i, n);
    if (n < kLanes) v = hn::IfThenElse(hn::FirstN(DF(), static_cast<size_t>(n)), v, filler);
    max = hn::Max(max, v);
    nan = hn::Or(nan, hn::VecFromMask(DF(), hn::IsNaN(v)));
  });
  if (!hn::AllFalse(DF(), hn::MaskFromVec(nan))) {
    for (int64_t i = 0; i < size; ++i)
      if (std::isnan(toFloat(x[i]))) return {i, toFloat(x[i])};
  }
  const float value = hn::GetLane(hn::MaxOfLanes(DF(), max));
  const V wanted = Set(value);
  for (int64_t i = 0; i < size; i += kLanes) {
    const auto lanes = hn::FirstN(DF(), static_cast<size_t>(std::min(kLanes, size - i)));
    const auto found = hn::And(lanes, hn::Eq(Load(x + i, std::min(kLanes, size - i)), wanted));
    if (!hn::AllFalse(DF(), found)) return {i + static_cast<int64_t>(hn::FindFirstTrue(DF(), found)), value};
  }
  return {0, toFloat(x[0])};
}

template <typename T>
void ArgmaxLoop(const TensorRef& logits, int64_t valid, Largest* pieces, int64_t count) {
  const T* x = logits.as<T>();
  const int64_t stride = logits.stride[0];
  const int64_t grain = std::max<int64_t>(1, 16384 / valid);
  parallelChunks(
      logits.shape[0] * count, grain,
      [=](int64_t begin, int64_t end) HWY_ATTR {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t first = task % count * kArgmaxPiece;
          pieces[task] = LargestOf(x + task / count * stride + first, std::min(kArgmaxPiece, valid - first));
          pieces[task].index += first;
        }
      },
      logits.shape[0] * valid);
}

void ArgmaxKernel(const TensorRef& logits, int64_t valid, Largest* pieces, int64_t count) {
  if (logits.dtype == DType::F32) return ArgmaxLoop<float>(logits, valid, pieces, count);
  ArgmaxLoop<BF16>(logits, valid, pieces, count);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "../checks/ops.h"
#include "cpu_backend.h"

namespace viaduct::cpu {

HWY_EXPORT(ArgmaxKernel);

void CpuBackend::argmax(Stream& s, Out index, Out value, In logits, int64_t vocabStart, int64_t vocabSize) {
  const int64_t tokens = logits.dim(0), valid = checkArgmax(index, value, logits, vocabStart, vocabSize);
  s.enqueue("argmax", [=] {
    const int64_t count = (valid + kArgmaxPiece - 1) / kArgmaxPiece;
    Largest* pieces = scratch<Largest>(static_cast<size_t>(tokens * count));
    if (count > 0) HWY_DYNAMIC_DISPATCH(ArgmaxKernel)(logits, valid, pieces, count);
    for (int64_t t = 0; t < tokens; ++t) {
      Largest best{0, -std::numeric_limits<float>::infinity()};  // a shard of padding alone
      for (int64_t k = 0; k < count; ++k) {
        const Largest& piece = pieces[t * count + k];
        if (k == 0 || piece.value > best.value || (std::isnan(piece.value) && !std::isnan(best.value))) best = piece;
      }
      index.as<int64_t>()[t] = vocabStart + best.index;
      value.as<float>()[t] = best.value;
    }
  });
}

}  // namespace viaduct::cpu
#endif  // HWY_ONCE
