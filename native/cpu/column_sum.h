// Sums over the rows of a matrix, one per column, in an order fixed by the shape: rows in blocks, blocks in turn. Used
// for bias gradients and norm weight gradients. Included once per instruction set, after vectors.h.
#include <algorithm>

#include "scratch.h"
#include "vectors.h"

#if defined(VIADUCT_CPU_COLUMN_SUM_H) == defined(HWY_TARGET_TOGGLE)
#ifdef VIADUCT_CPU_COLUMN_SUM_H
#undef VIADUCT_CPU_COLUMN_SUM_H
#else
#define VIADUCT_CPU_COLUMN_SUM_H
#endif

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {

/// acc[k][c] += sum over t of f(k, t, c, n), output k's terms of columns [c, c + n) of row t. A null acc[k] is skipped.
template <int kOutputs, typename F>
void SumColumns(float* const* acc, int64_t rows, int64_t columns, F&& f) {
  if (rows <= 0 || columns <= 0) return;
  // At most 32 blocks, each of at least 64 rows: enough for the threads, and little to add up at the end.
  const int64_t blockRows = rows * columns <= 16384 ? rows : std::max<int64_t>(64, (rows + 31) / 32);
  const int64_t blocks = (rows + blockRows - 1) / blockRows;
  const int64_t width = kOutputs * columns;
  float* partial = scratch<float>(static_cast<size_t>(blocks * width));
  parallelFor(blocks, [=](int64_t block) HWY_ATTR {
    const int64_t begin = block * blockRows;
    const int64_t end = std::min(rows, begin + blockRows);
    float* mine = partial + block * width;
    std::fill(mine, mine + width, 0.0f);
    for (int k = 0; k < kOutputs; ++k) {
      if (acc[k] == nullptr) continue;
      float* sum = mine + k * columns;
      int64_t t = begin;
      for (; t + 4 <= end; t += 4) {
        ForVectors(columns, [=](int64_t c, int64_t n) HWY_ATTR {
          const V low = hn::Add(f(k, t, c, n), f(k, t + 1, c, n));
          const V high = hn::Add(f(k, t + 2, c, n), f(k, t + 3, c, n));
          Store(hn::Add(Load(sum + c, n), hn::Add(low, high)), sum + c, n);
        });
      }
      for (; t < end; ++t) {
        ForVectors(columns,
                   [=](int64_t c, int64_t n) HWY_ATTR { Store(hn::Add(Load(sum + c, n), f(k, t, c, n)), sum + c, n); });
      }
    }
  });
  for (int k = 0; k < kOutputs; ++k) {
    float* out = acc[k];
    if (out == nullptr) continue;
    parallelChunks(columns, 4096, [=](int64_t begin, int64_t end) HWY_ATTR {
      ForVectors(end - begin, [=](int64_t i, int64_t n) HWY_ATTR {
        V sum = Zero();
        for (int64_t b = 0; b < blocks; ++b) sum = hn::Add(sum, Load(partial + b * width + k * columns + begin + i, n));
        Store(hn::Add(Load(out + begin + i, n), sum), out + begin + i, n);
      });
    });
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();
#endif  // per-target include guard
