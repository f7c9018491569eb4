// Lookup of embedding rows and its gradient. The gradient groups tokens by row by a sort on (row, token), so that
// each row adds up its tokens in token order on one thread, whatever the number of threads.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/embedding.cc"
#include "vectors.h"

#ifndef VIADUCT_CPU_EMBEDDING
#define VIADUCT_CPU_EMBEDDING
namespace viaduct::cpu {

struct TokenOfRow {
  int64_t row;
  int64_t token;
};

}  // namespace viaduct::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {
namespace {

// dw[row] += dy[token] for each pair in turn. Tasks are cut in columns, and in runs of pairs that share no row.
template <typename T>
void EmbeddingBackwardLoop(const TensorRef& dw, const TensorRef& dy, const TokenOfRow* pairs, const int64_t* runs,
                           int64_t count) {
  const int64_t columns = dw.shape[1], dwStride = dw.stride[0], dyStride = dy.stride[0];
  constexpr int64_t kStrip = 512;
  const int64_t strips = (columns + kStrip - 1) / kStrip;
  float* out = dw.as<float>();
  const T* in = dy.as<T>();
  parallelFor(count * strips, [=](int64_t task) HWY_ATTR {
    const int64_t run = task / strips, begin = task % strips * kStrip, width = std::min(kStrip, columns - begin);
    for (int64_t p = runs[run]; p < runs[run + 1]; ++p) {
      float* row = out + pairs[p].row * dwStride + begin;
      const T* grad = in + pairs[p].token * dyStride + begin;
      ForVectors(width, [=](int64_t i, int64_t n)
                            HWY_ATTR { Store(hn::Add(Load(row + i, n), Load(grad + i, n)), row + i, n); });
    }
  });
}

void EmbeddingBackwardKernel(const TensorRef& dw, const TensorRef& dy, const TokenOfRow* pairs, const int64_t* runs,
                             int64_t count) {
  if (dy.dtype == DType::F32) return EmbeddingBackwardLoop<float>(dw, dy, pairs, runs, count);
  EmbeddingBackwardLoop<BF16>(dw, dy, pairs, runs, count);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <vector>

#include "../checks/ops.h"
#include "../ids.h"
#include "cpu_backend.h"

namespace viaduct::cpu {

HWY_EXPORT(EmbeddingBackwardKernel);

void CpuBackend::embeddingForward(Stream& s, Out y, In w, In ids, int64_t vocabStart) {
  checkEmbeddingForward(y, w, ids);
  s.enqueue("embeddingForward", [=] {
    const Ids at(ids);
    const int64_t bytes = static_cast<int64_t>(dtypeBytes(w.dtype)), width = w.dim(1) * bytes;
    parallelChunks(ids.dim(0), std::max<int64_t>(1, 65536 / std::max<int64_t>(1, width)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t t = begin; t < end; ++t) {
                       const int64_t row = at[t] - vocabStart;
                       char* out = y.as<char>() + t * y.stride[0] * bytes;
                       if (row >= 0 && row < w.dim(0)) {
                         std::memcpy(out, w.as<char>() + row * w.stride[0] * bytes, static_cast<size_t>(width));
                       } else {
                         std::memset(out, 0, static_cast<size_t>(width));
                       }
                     }
                   });
  });
}

void CpuBackend::embeddingBackward(Stream& s, InOut dw, In dy, In ids, int64_t vocabStart) {
  checkEmbeddingBackward(dw, dy, ids);
  s.enqueue("embeddingBackward", [=] {
    const Ids at(ids);
    std::vector<TokenOfRow> pairs;
    for (int64_t t = 0; t < ids.dim(0); ++t) {
      const int64_t row = at[t] - vocabStart;
      if (row >= 0 && row < dw.dim(0)) pairs.push_back({row, t});
    }
    std::sort(pairs.begin(), pairs.end(), [](const TokenOfRow& a, const TokenOfRow& b) {
      return a.row != b.row ? a.row < b.row : a.token < b.token;
    });
    const int64_t n = static_cast<int64_t>(pairs.size());
    std::vector<int64_t> runs = {0};  // at least 32 pairs each, cut where the row changes
    for (int64_t p = 1; p < n; ++p)
      if (p - runs.back() >= 32 && pairs[p].row != pairs[p - 1].row) runs.push_back(p);
    runs.push_back(n);
    HWY_DYNAMIC_DISPATCH(EmbeddingBackwardKernel)
    (dw, dy, pairs.data(), runs.data(), static_cast<int64_t>(runs.size()) - 1);
  });
}

}  // namespace viaduct::cpu
#endif  // HWY_ONCE
