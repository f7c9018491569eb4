// Cross entropy over a vocabulary that may be cut over ranks: statistics of this shard, their combination, the
// gradient. Logits are read once per pass in blocks that stay in the first cache; no second copy of them is made.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/cross_entropy.cc"
#include "scratch.h"
#include "vector_math.h"
#include "vector_pairs.h"

#ifndef VIADUCT_CPU_CROSS_ENTROPY
#define VIADUCT_CPU_CROSS_ENTROPY
#include <cmath>
#include <limits>

#include "../ids.h"
namespace viaduct::cpu {

constexpr int64_t kPiece = 32768;  // columns of one task
constexpr int64_t kCached = 2048;  // columns of one block: maximum first, then the exponentials

struct RowStats {
  float max;
  double sum;
};

struct GradientArgs {
  TensorRef dLogits, logits, labels;
  const float* lse = nullptr;
  const float* dLoss = nullptr;
  bool onePerToken = false;
  int64_t vocabStart = 0;
  int64_t valid = 0;  // columns of this shard that are not padding
};

}  // namespace viaduct::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {
namespace {

// Terms of a softmax, as exact as logits of type T deserve.
template <typename T>
HWY_INLINE V Term(V x) {
  if constexpr (std::is_same_v<T, BF16>)
    return ShortExpBelow(x);
  else
    return ExpBelow(x);
}

// The largest of n > 0 elements; a NaN may or may not show (the sum has it).
template <typename T>
HWY_INLINE float MaxOf(const T* x, int64_t size) {
  const V lowest = Set(-std::numeric_limits<float>::infinity());
  const auto larger = [](V m, V v) HWY_ATTR { return hn::Max(m, v); };
  Pair m{lowest, lowest}, k = m;
  int64_t i = 0;
  for (; i + 2 * kPair <= size; i += 2 * kPair) {
    m = Each(larger, m, ReadPair(x + i));
    k = Each(larger, k, ReadPair(x + i + kPair));
  }
  V most = hn::Max(hn::Max(m.a, m.b), hn::Max(k.a, k.b));
  for (; i < size; i += kLanes) {
    const int64_t n = std::min(kLanes, size - i);
    most = hn::Max(most, hn::IfThenElse(hn::FirstN(DF(), static_cast<size_t>(n)), Load(x + i, n), lowest));
  }
  return hn::GetLane(hn::MaxOfLanes(DF(), most));
}

// max and sum of exp(x - max) of one piece of a row, in one pass over memory.
template <typename T>
RowStats PieceStats(const T* x, int64_t size) {
  float max = -std::numeric_limits<float>::infinity();
  double sum = 0;
  for (int64_t begin = 0; begin < size; begin += kCached) {
    const int64_t n = std::min(kCached, size - begin);
    const T* block = x + begin;
    const float blockMax = MaxOf(block, n);
    if (blockMax > max) {
      sum = sum == 0 ? 0 : sum * std::exp(static_cast<double>(max) - blockMax);
      max = blockMax;
    }
    // All -inf so far: each term is exp(-inf), not exp(-inf + inf).
    const V shift = Set(max == -std::numeric_limits<float>::infinity() ? 0.0f : max);
    const auto term = [=](V v) HWY_ATTR { return Term<T>(hn::Sub(v, shift)); };
    sum += SumPairs(n, [=](int64_t i, int64_t m) HWY_ATTR {
      PrefetchPair(block + n + i);  // the next block comes into the first cache meanwhile
      return KeepFirst<T>(Each(term, LoadPair(block + i, m)), m);
    });
  }
  return RowStats{max, sum};
}

template <typename T>
void StatsLoop(const TensorRef& logits, int64_t valid, RowStats* pieces, int64_t count) {
  const T* x = logits.as<T>();
  const int64_t stride = logits.stride[0];
  const int64_t grain = count > 1 ? 1 : std::max<int64_t>(1, 8192 / std::max<int64_t>(1, valid));
  parallelChunks(logits.shape[0] * count, grain, [=](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % count * kPiece;
      pieces[task] = PieceStats(x + task / count * stride + first, std::min(kPiece, valid - first));
    }
  });
}

void CrossEntropyStatsKernel(const TensorRef& logits, int64_t valid, RowStats* pieces, int64_t count) {
  if (logits.dtype == DType::F32) return StatsLoop<float>(logits, valid, pieces, count);
  StatsLoop<BF16>(logits, valid, pieces, count);
}

template <typename T>
void GradientLoop(const GradientArgs& args) {
  const GradientArgs a = args;
  const Ids labels(a.labels);
  const int64_t columns = a.logits.shape[1], pieces = (columns + kPiece - 1) / kPiece;
  const T* logits = a.logits.as<T>();
  T* dLogits = a.dLogits.as<T>();
  const int64_t grain = pieces > 1 ? 1 : std::max<int64_t>(1, 8192 / std::max<int64_t>(1, columns));
  parallelChunks(a.logits.shape[0] * pieces, grain, [=](int64_t firstTask, int64_t lastTask) HWY_ATTR {
    for (int64_t task = firstTask; task < lastTask; ++task) {
      const int64_t t = task / pieces, begin = task % pieces * kPiece, end = std::min(columns, begin + kPiece);
      const T* x = logits + t * a.logits.stride[0];
      T* out = dLogits + t * a.dLogits.stride[0];
      const int64_t label = labels[t];
      const float dLoss = a.dLoss[a.onePerToken ? t : 0];
      const int64_t stop = label == kIgnoredLabel || dLoss == 0 ? begin : std::max(begin, std::min(end, a.valid));
      const int64_t at = label - a.vocabStart;
      const bool here = at >= begin && at < stop;
      const float labelLogit = here ? toFloat(x[at]) : 0;
      const V lse = Set(a.lse[t]), scale = Set(dLoss);
      const auto slope = [=](V v) HWY_ATTR { return hn::Mul(Term<T>(hn::Sub(v, lse)), scale); };
      ForPairs(stop - begin, [=](int64_t i, int64_t n)
                                 HWY_ATTR { StorePair(Each(slope, LoadPair(x + begin + i, n)), out + begin + i, n); });
      if (stop < end) std::memset(static_cast<void*>(out + stop), 0, static_cast<size_t>(end - stop) * sizeof(T));
      if (here)
        out[at] = fromFloat<T>(static_cast<float>(std::expm1(static_cast<double>(labelLogit) - a.lse[t]) * dLoss));
    }
  });
}

void CrossEntropyBackwardKernel(const GradientArgs& a) {
  a.logits.dtype == DType::F32 ? GradientLoop<float>(a) : GradientLoop<BF16>(a);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "../checks/ops.h"
#include "cpu_backend.h"

namespace viaduct::cpu {

HWY_EXPORT(CrossEntropyStatsKernel);
HWY_EXPORT(CrossEntropyBackwardKernel);

namespace {

float logitAt(const TensorRef& logits, int64_t t, int64_t column) {
  const int64_t at = t * logits.stride[0] + column;
  return logits.dtype == DType::F32 ? logits.as<float>()[at] : toFloat(logits.as<BF16>()[at]);
}

}  // namespace

void CpuBackend::crossEntropyStats(Stream& s, Out stats, In logits, In labels, int64_t vocabStart, int64_t vocabSize) {
  const int64_t tokens = logits.dim(0), valid = checkCrossEntropyStats(stats, logits, labels, vocabStart, vocabSize);
  s.enqueue("crossEntropyStats", [=] {
    const int64_t count = (valid + kPiece - 1) / kPiece;
    RowStats* pieces = scratch<RowStats>(static_cast<size_t>(tokens * count));
    if (count > 0) HWY_DYNAMIC_DISPATCH(CrossEntropyStatsKernel)(logits, valid, pieces, count);
    float *max = stats.as<float>(), *sum = max + tokens, *own = sum + tokens;
    const Ids at(labels);
    parallelChunks(tokens, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        float m = -std::numeric_limits<float>::infinity();
        for (int64_t k = 0; k < count; ++k) m = std::max(m, pieces[t * count + k].max);
        double total = 0;
        for (int64_t k = 0; k < count; ++k) {
          const RowStats& piece = pieces[t * count + k];
          total += piece.max == m ? piece.sum : piece.sum * std::exp(static_cast<double>(piece.max) - m);
        }
        max[t] = m;
        sum[t] = static_cast<float>(total);
        const int64_t column = at[t] - vocabStart;
        own[t] = at[t] != kIgnoredLabel && column >= 0 && column < valid ? logitAt(logits, t, column) : 0.0f;
      }
    });
  });
}

void CpuBackend::crossEntropyCombine(Stream& s, Out lse, Out loss, In stats, In labels) {
  checkCrossEntropyCombine(lse, loss, stats, labels);
  const int64_t shards = stats.dim(0), tokens = stats.dim(2);
  s.enqueue("crossEntropyCombine", [=] {
    const Ids at(labels);
    parallelChunks(tokens, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const float* first = stats.as<float>() + t;
        float max = -std::numeric_limits<float>::infinity();
        for (int64_t p = 0; p < shards; ++p) max = std::max(max, first[p * 3 * tokens]);
        double sum = 0, own = 0;
        for (int64_t p = 0; p < shards; ++p) {
          const float* shard = first + p * 3 * tokens;
          const float shardSum = shard[tokens];
          // A shard of padding alone has max = -inf and sum = 0; a NaN sum must pass.
          sum += shard[0] == max || shardSum == 0 ? shardSum : shardSum * std::exp(static_cast<double>(shard[0]) - max);
          own += shard[2 * tokens];
        }
        lse.as<float>()[t] = static_cast<float>(max + std::log(sum));
        loss.as<float>()[t] = at[t] == kIgnoredLabel ? 0.0f : static_cast<float>(max - own + std::log(sum));
      }
    });
  });
}

void CpuBackend::crossEntropyBackward(Stream& s, Out dLogits, In logits, In lse, In labels, In dLoss,
                                      int64_t vocabStart, int64_t vocabSize) {
  GradientArgs a;
  a.valid = checkCrossEntropyBackward(dLogits, logits, lse, labels, dLoss, vocabStart, vocabSize);
  a.dLogits = dLogits, a.logits = logits, a.labels = labels, a.lse = lse.as<float>(), a.dLoss = dLoss.as<float>();
  a.onePerToken = !isOneNumber(dLoss), a.vocabStart = vocabStart;
  s.enqueue("crossEntropyBackward", [a] { HWY_DYNAMIC_DISPATCH(CrossEntropyBackwardKernel)(a); });
}

}  // namespace viaduct::cpu
#endif  // HWY_ONCE
