// Which experts a token goes to, and the order of the rows that go there. A row of logits is a few hundred numbers: plain loops, a
// task for some tokens.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../checks/ops.h"
#include "../half.h"
#include "cpu_backend.h"
#include "parallel.h"

namespace viaduct::cpu {

namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

struct Router {
  int64_t E = 0;
  int64_t K = 0;
  int64_t groups = 1;
  int64_t groupTopk = 1;
  bool sigmoid = false;
  bool normalize = false;
  float scaling = 1;
};

/// Calls f(begin, end) for runs of tokens.
template <typename F>
void forTokens(int64_t tokens, int64_t perToken, const F& f) {
  const int64_t each = std::max<int64_t>(1, perToken);
  parallelChunks(tokens, std::max<int64_t>(1, 16384 / each), f, tokens * each);
}

template <typename T>
void scoresOf(const Router& r, const T* logits, float* scores) {
  if (r.sigmoid) {
    for (int64_t e = 0; e < r.E; ++e) scores[e] = 1.0f / (1.0f + std::exp(-toFloat(logits[e])));
    return;
  }
  float most = kLowest;
  for (int64_t e = 0; e < r.E; ++e) most = std::max(most, toFloat(logits[e]));
  double total = 0;
  for (int64_t e = 0; e < r.E; ++e) {
    scores[e] = std::exp(toFloat(logits[e]) - most);
    total += scores[e];
  }
  const float factor = static_cast<float>(1.0 / total);
  for (int64_t e = 0; e < r.E; ++e) scores[e] *= factor;
}

/// The first of the highest of [0, n) that is not taken, which it takes; a NaN counts as the lowest.
int64_t takeHighest(const float* keys, bool* taken, int64_t n) {
  int64_t best = -1;
  for (int64_t i = 0; i < n; ++i) {
    if (taken[i]) continue;
    if (best < 0 || keys[i] > keys[best] || (std::isnan(keys[best]) && keys[i] > kLowest)) best = i;
  }
  taken[best] = true;
  return best;
}

/// Marks the experts of all groups but the best as taken.
void keepGroups(const Router& r, const float* keys, bool* taken, float* sums, bool* groupTaken) {
  const int64_t width = r.E / r.groups;
  for (int64_t g = 0; g < r.groups; ++g) {
    sums[g] = 0;
    for (int64_t k = 0; k < r.K / r.groupTopk; ++k)
      sums[g] += keys[g * width + takeHighest(keys + g * width, taken + g * width, width)];
  }
  std::fill(groupTaken, groupTaken + r.groups, false);
  std::fill(taken, taken + r.E, true);
  for (int64_t k = 0; k < r.groupTopk; ++k) {
    const int64_t g = takeHighest(sums, groupTaken, r.groups);
    std::fill(taken + g * width, taken + (g + 1) * width, false);
  }
}

template <typename T>
void route(const Router& r, const TensorRef& weights, const TensorRef& experts, const TensorRef& scores,
           const TensorRef& logits, const TensorRef& bias) {
  forTokens(logits.dim(0), r.E * (r.K + 8), [&](int64_t begin, int64_t end) {
    std::vector<float> keys(static_cast<size_t>(r.E)), sums(static_cast<size_t>(r.groups));
    const auto taken = std::make_unique<bool[]>(static_cast<size_t>(r.E));
    const auto groupTaken = std::make_unique<bool[]>(static_cast<size_t>(r.groups));
    for (int64_t t = begin; t < end; ++t) {
      float* score = scores.as<float>() + t * r.E;
      scoresOf(r, logits.as<T>() + t * logits.stride[0], score);
      for (int64_t e = 0; e < r.E; ++e)
        keys[static_cast<size_t>(e)] = score[e] + (bias.present() ? bias.as<float>()[e] : 0);
      std::fill(taken.get(), taken.get() + r.E, false);
      if (r.groups > 1) keepGroups(r, keys.data(), taken.get(), sums.data(), groupTaken.get());
      int32_t* chosen = experts.as<int32_t>() + t * r.K;
      float* weight = weights.as<float>() + t * r.K;
      float total = 0;
      for (int64_t k = 0; k < r.K; ++k) {
        chosen[k] = static_cast<int32_t>(takeHighest(keys.data(), taken.get(), r.E));
        weight[k] = score[chosen[k]];
        total += weight[k];
      }
      const float factor = r.normalize ? r.scaling / (total + 1e-20f) : r.scaling;
      for (int64_t k = 0; k < r.K; ++k) weight[k] *= factor;
    }
  });
}

template <typename T>
void routeBack(const Router& r, const TensorRef& dLogits, const TensorRef& dWeights, const TensorRef& dScores,
               const TensorRef& experts, const TensorRef& scores) {
  forTokens(dLogits.dim(0), r.E * 4, [&](int64_t begin, int64_t end) {
    std::vector<float> d(static_cast<size_t>(r.E));
    for (int64_t t = begin; t < end; ++t) {
      const float* score = scores.as<float>() + t * r.E;
      const float* from = dScores.present() ? dScores.as<float>() + t * r.E : nullptr;
      for (int64_t e = 0; e < r.E; ++e) d[static_cast<size_t>(e)] = from != nullptr ? from[e] : 0;
      if (dWeights.present()) {
        const int32_t* chosen = experts.as<int32_t>() + t * r.K;
        const float* dWeight = dWeights.as<float>() + t * r.K;
        double total = 0, mixed = 0;
        for (int64_t k = 0; k < r.K; ++k) {
          total += score[chosen[k]];
          mixed += static_cast<double>(dWeight[k]) * score[chosen[k]];
        }
        total += 1e-20;
        for (int64_t k = 0; k < r.K; ++k) {
          const double own = r.normalize ? (dWeight[k] - mixed / total) / total : dWeight[k];
          d[static_cast<size_t>(chosen[k])] += static_cast<float>(r.scaling * own);
        }
      }
      T* out = dLogits.as<T>() + t * dLogits.stride[0];
      double inner = 0;
      if (!r.sigmoid) {
        for (int64_t e = 0; e < r.E; ++e) inner += static_cast<double>(d[static_cast<size_t>(e)]) * score[e];
      }
      for (int64_t e = 0; e < r.E; ++e) {
        const float slope = r.sigmoid ? 1.0f - score[e] : 1.0f;
        out[e] = fromFloat<T>(score[e] * slope * (d[static_cast<size_t>(e)] - static_cast<float>(inner)));
      }
    }
  });
}

}  // namespace

void CpuBackend::routerForward(Stream& s, Out weights, Out experts, Out scores, In logits, OptIn bias, bool sigmoid,
                               bool normalize, int64_t groups, int64_t groupTopk, double scaling) {
  checkRouterForward(weights, experts, scores, logits, bias, groups, groupTopk);
  const Router r{logits.dim(1), experts.dim(1), groups, groupTopk, sigmoid, normalize, static_cast<float>(scaling)};
  s.enqueue("routerForward", [=] {
    if (logits.dtype == DType::F32) return route<float>(r, weights, experts, scores, logits, bias);
    route<BF16>(r, weights, experts, scores, logits, bias);
  });
}

void CpuBackend::routerBackward(Stream& s, Out dLogits, OptIn dWeights, OptIn dScores, In experts, In scores,
                                bool sigmoid, bool normalize, double scaling) {
  checkRouterBackward(dLogits, dWeights, dScores, experts, scores);
  const Router r{scores.dim(1), experts.dim(1), 1, 1, sigmoid, normalize, static_cast<float>(scaling)};
  s.enqueue("routerBackward", [=] {
    if (dLogits.dtype == DType::F32) return routeBack<float>(r, dLogits, dWeights, dScores, experts, scores);
    routeBack<BF16>(r, dLogits, dWeights, dScores, experts, scores);
  });
}

void CpuBackend::capExperts(Stream& s, Out capped, In experts, OptIn weights, int64_t numExperts, int64_t capacity) {
  checkCapExperts(capped, experts, weights, capacity);
  s.enqueue("capExperts", [=] {
    const int64_t n = experts.numel();
    const int32_t* expert = experts.as<int32_t>();
    std::vector<std::vector<int64_t>> choices(static_cast<size_t>(numExperts));
    for (int64_t i = 0; i < n; ++i) {
      capped.as<int32_t>()[i] = expert[i];
      if (expert[i] >= 0 && expert[i] < numExperts) choices[static_cast<size_t>(expert[i])].push_back(i);
    }
    for (std::vector<int64_t>& of : choices) {
      if (static_cast<int64_t>(of.size()) <= capacity) continue;
      if (weights.present()) {
        const float* weight = weights.as<float>();
        std::stable_sort(of.begin(), of.end(), [&](int64_t a, int64_t b) { return weight[a] > weight[b]; });
      }
      for (size_t k = static_cast<size_t>(capacity); k < of.size(); ++k)
        capped.as<int32_t>()[of[k]] = static_cast<int32_t>(numExperts);
    }
  });
}

void CpuBackend::expertCounts(Stream& s, Out counts, In experts) {
  checkExpertCounts(counts, experts);
  s.enqueue("expertCounts", [=] {
    const int64_t E = counts.dim(1), perRun = experts.numel() / counts.dim(0);
    std::fill(counts.as<float>(), counts.as<float>() + counts.numel(), 0.0f);
    for (int64_t i = 0; i < experts.numel(); ++i) {
      const int64_t e = experts.as<int32_t>()[i];
      if (e >= 0 && e < E) counts.as<float>()[i / perRun * E + e] += 1;
    }
  });
}

void CpuBackend::expertOrder(Stream& s, Out source, Out place, In experts, int64_t numExperts) {
  checkExpertOrder(source, place, experts, numExperts);
  s.enqueue("expertOrder", [=] {
    const int64_t n = experts.numel();
    const int32_t* expert = experts.as<int32_t>();
    std::vector<int64_t> next(static_cast<size_t>(numExperts) + 1, 0);
    for (int64_t i = 0; i < n; ++i) ++next[static_cast<size_t>(std::clamp<int64_t>(expert[i], 0, numExperts - 1)) + 1];
    for (size_t e = 1; e < next.size(); ++e) next[e] += next[e - 1];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = next[static_cast<size_t>(std::clamp<int64_t>(expert[i], 0, numExperts - 1))]++;
      source.as<int32_t>()[at] = static_cast<int32_t>(i);
      place.as<int32_t>()[i] = static_cast<int32_t>(at);
    }
  });
}

void CpuBackend::expertSlots(Stream& s, Out source, Out place, In experts, int64_t numExperts, int64_t capacity) {
  checkExpertSlots(source, place, experts, numExperts, capacity);
  s.enqueue("expertSlots", [=] {
    int32_t *from = source.as<int32_t>(), *to = place.as<int32_t>();
    std::fill(from, from + source.numel(), -1);
    std::vector<int64_t> taken(static_cast<size_t>(numExperts), 0);
    for (int64_t i = 0; i < experts.numel(); ++i) {
      const int64_t e = experts.as<int32_t>()[i];
      const bool has = e >= 0 && e < numExperts && taken[static_cast<size_t>(e)] < capacity;
      const int64_t at = has ? e * capacity + taken[static_cast<size_t>(e)]++ : numExperts * capacity;
      to[i] = static_cast<int32_t>(at);
      if (has) from[at] = static_cast<int32_t>(i);
    }
  });
}

}  // namespace viaduct::cpu
