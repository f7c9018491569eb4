// What a router is trained by besides its choices, and noise on what it reads: balanceScores, jitter. Rows are a few hundred numbers
// or seldom asked for: plain loops.
#include <algorithm>

#include "../checks/ops.h"
#include "../half.h"
#include "../ids.h"
#include "../philox.h"
#include "cpu_backend.h"
#include "parallel.h"

namespace viaduct::cpu {

void CpuBackend::balanceScores(Stream& s, Out dScores, Out losses, In scores, In counts, int64_t first, int64_t tokens,
                               double factor, bool normalize) {
  checkBalanceScores(dScores, losses, scores, counts, first, tokens);
  s.enqueue("balanceScores", [=] {
    const int64_t E = scores.dim(1), perRun = tokens / counts.dim(0);
    parallelChunks(scores.dim(0), std::max<int64_t>(1, 16384 / std::max<int64_t>(1, E)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const float* score = scores.as<float>() + i * E;
                       float* d = dScores.as<float>() + i * E;
                       if (first + i >= tokens) {
                         std::fill(d, d + E, 0.0f);
                         losses.as<float>()[i] = 0;
                         continue;
                       }
                       const float* count = counts.as<float>() + (first + i) / perRun * E;
                       double mixed = 0, total = normalize ? 1e-20 : 1;
                       for (int64_t e = 0; e < E; ++e) {
                         mixed += static_cast<double>(count[e]) * score[e];
                         if (normalize) total += score[e];
                       }
                       const double loss = mixed / total, mean = normalize ? loss : 0;
                       for (int64_t e = 0; e < E; ++e) d[e] = static_cast<float>(factor * (count[e] - mean) / total);
                       losses.as<float>()[i] = static_cast<float>(factor * loss);
                     }
                   });
  });
}

namespace {

template <typename T>
void jitterRows(const TensorRef& y, const TensorRef& x, Ids samples, Ids positions, PhiloxKey key, uint32_t site,
                float eps) {
  const int64_t C = x.dim(1);
  parallelChunks(x.dim(0), std::max<int64_t>(1, 4096 / std::max<int64_t>(1, C)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t c = 0; c < C; ++c) {
        const float u = static_cast<float>(drawAt(key, samples[t], positions[t], site, c)) * 0x1p-32f;
        const float noise = 1.0f - eps + 2.0f * eps * u;
        y.as<T>()[t * C + c] = fromFloat<T>(toFloat(x.as<T>()[t * C + c]) * noise);
      }
  });
}

}  // namespace

void CpuBackend::jitter(Stream& s, Out y, In x, In rng, In sampleIds, In positions, int64_t site, double eps) {
  checkJitter(y, x, rng, sampleIds, positions, site, eps);
  s.enqueue("jitter", [=] {
    const int64_t* seedAndStep = rng.as<int64_t>();
    const PhiloxKey key = philoxKey(seedAndStep[0], seedAndStep[1], kUseJitter);
    const uint32_t at = static_cast<uint32_t>(site);
    if (x.dtype == DType::F32) {
      jitterRows<float>(y, x, Ids(sampleIds), Ids(positions), key, at, static_cast<float>(eps));
    } else {
      jitterRows<BF16>(y, x, Ids(sampleIds), Ids(positions), key, at, static_cast<float>(eps));
    }
  });
}

}  // namespace viaduct::cpu
