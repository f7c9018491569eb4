// Attention forward: blocks of queries against blocks of keys with a running softmax, and the path of few queries, which
// reads each key and value once. Tasks and their sums are cut by shape alone.
#include <cmath>
#include <limits>
#include <vector>

#include "attention_factors.h"
#include "parallel.h"

namespace viaduct::cpu {

namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr int64_t kRows = 192;    // rows of a block of queries: packed, they stay in the second-level cache
constexpr int64_t kFewRows = 16;  // up to here keys are read as they lie
constexpr int64_t kChunk = 128;   // keys of a task when there are few rows

// Cuts pieces of F32 from one block of the thread's memory.
class Pieces {
 public:
  explicit Pieces(float* data) : data_(data) {}
  float* take(int64_t floats) {
    float* p = data_;
    data_ += roundUp(floats, 16);
    return p;
  }

 private:
  float* data_;
};

// out = o / l and lse = m + log(l); zeros and -inf for a row that saw nothing.
void finishRow(const AttentionArgs& a, int64_t b, int64_t g, int64_t r, int64_t i, float* o, float m, float l) {
  if (l == 0.0f) {
    std::fill(o, o + a.Dv, 0.0f);
    *a.lseAt(b, g, r, i) = kNothing;
  } else {
    const float inverse = 1.0f / l;
    for (int64_t j = 0; j < a.Dv; ++j) o[j] *= inverse;
    *a.lseAt(b, g, r, i) = m + std::log(l);
  }
  castRow(a.out.dtype, DType::F32)(a.out.at(b, i, g, r), 1, o, 1, a.Dv);
}

template <typename F>
void forwardBlock(const AttentionArgs& a, int64_t b, int64_t g, int64_t begin, int64_t end) {
  const int64_t rows = (end - begin) * a.R;
  const TileShape tile = registerTile();
  const int64_t packedRows = roundUp(rows, tile.mr);
  const int64_t ld = roundUp(kKeyBlock, tile.nr);
  const int64_t packedDv = roundUp(a.Dv, tile.nr);
  using Element = typename F::Element;
  Pieces pieces(threadScratch(kAttention, rows * a.D + packedRows * a.D + ld * a.D + packedDv * kKeyBlock +
                                              2 * rows * ld + kGroup * kKeyBlock + rows * a.Dv + 3 * rows + 16 * 12));
  auto* q = reinterpret_cast<Element*>(pieces.take(rows * a.D));
  float* packedQ = pieces.take(packedRows * a.D);
  float* packedK = pieces.take(ld * a.D);
  float* packedV = pieces.take(packedDv * kKeyBlock);
  float* scores = pieces.take(rows * ld);
  auto* narrow = reinterpret_cast<Element*>(pieces.take(rows * ld));
  float* packedP = pieces.take(kGroup * kKeyBlock);
  float* o = pieces.take(rows * a.Dv);
  float* m = pieces.take(rows);
  float* l = pieces.take(rows);
  float* correction = pieces.take(rows);
  std::fill(m, m + rows, kNothing);
  std::fill(l, l + rows, 0.0f);
  std::fill(o, o + rows * a.Dv, 0.0f);
  thread_local std::vector<Visible> see;
  see.resize(static_cast<size_t>(rows));

  F::gather(q, a, a.q, b, g, begin, end, a.D, a.scale);
  F::rows(packedQ, q, a.D, rows, a.D);
  const Visible span = visibleSpan(a, b, begin, end);
  for (int64_t block = span.lo / kKeyBlock * kKeyBlock; block < span.hi; block += kKeyBlock) {
    const int64_t from = std::max(block, span.lo);
    const int64_t to = std::min(block + kKeyBlock, span.hi);
    const int64_t n = to - from;
    if (!visibleRows(see.data(), a, b, begin, end, from, to)) continue;
    F::columnsAcross(packedK, a.k.at(b, from, g), a.k.dtype, a.k.position, a.D, n);
    multiplySeen<F>(scores, ld, packedQ, packedK, rows, a.D, see.data());
    softmaxBlock(scores, ld, rows, n, see.data(), F::scoreScale(a), a.softcap, m, l, correction);
    scaleRows(o, a.Dv, rows, a.Dv, correction);
    F::columns(packedV, a.v.at(b, from, g), a.v.dtype, a.v.position, n, a.Dv);
    addSeen<F>(o, a.Dv, F::narrow(scores, narrow, rows, n, ld), ld, packedV, n, rows, see.data(), packedP);
  }
  int64_t row = 0;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t r = 0; r < a.R; ++r, ++row) finishRow(a, b, g, r, i, o + row * a.Dv, m[row], l[row]);
  }
}

// Few rows: a task is (sample, group, chunk of keys); its maximum, sum and output are merged in the order of the chunks.
void forwardFewRows(const AttentionArgs& a) {
  const int64_t rows = a.S * a.R;
  int64_t last = 0;
  for (int64_t b = 0; b < a.B; ++b) last = std::max(last, visibleSpan(a, b, 0, a.S).hi);
  const int64_t chunks = std::max<int64_t>(1, (last + kChunk - 1) / kChunk);
  const int64_t record = rows * (a.Dv + 2);
  float* records = threadScratch(kOperation, a.B * a.G * chunks * record);
  parallelFor(
      a.B * a.G * chunks,
      [&](int64_t task) {
        // Groups first: the heads of a token lie together, and what is fetched beside one group serves the next.
        const int64_t g = task % a.G;
        const int64_t chunk = task / a.G % chunks;
        const int64_t b = task / a.G / chunks;
        float* m = records + ((b * a.G + g) * chunks + chunk) * record;
        float* l = m + rows;
        float* o = l + rows;
        std::fill(m, m + rows, kNothing);
        std::fill(l, l + rows, 0.0f);
        const Visible span = visibleSpan(a, b, 0, a.S);
        const int64_t from = std::max(chunk * kChunk, span.lo);
        const int64_t to = std::min((chunk + 1) * kChunk, span.hi);
        thread_local std::vector<Visible> see;
        see.resize(static_cast<size_t>(rows));
        if (from >= to || !visibleRows(see.data(), a, b, 0, a.S, from, to)) return;
        Pieces pieces(threadScratch(kAttention, rows * a.D + rows * kChunk + rows + 64));
        float* q = pieces.take(rows * a.D);
        float* scores = pieces.take(rows * kChunk);
        float* correction = pieces.take(rows);
        gatherRows(q, a, a.q, b, g, 0, a.S, a.D, a.scale);
        for (int64_t row = 0; row < rows; ++row) orderForWeights(q + row * a.D, a.D, a.k.dtype);
        multiplyFewRows(scores, kChunk, q, a.D, {a.k.at(b, from, g), a.k.dtype, 1, a.k.position}, rows, to - from, a.D,
                        false, nullptr);
        softmaxBlock(scores, kChunk, rows, to - from, see.data(), 1.0f, a.softcap, m, l, correction);
        sumValues(o, a.Dv, scores, kChunk, a.v.at(b, from, g), a.v.dtype, a.v.position, rows, to - from, a.Dv, false);
      },
      a.B * a.G * rows * last * (a.D + a.Dv));
  parallelFor(
      a.B * a.G,
      [&](int64_t task) {
        float* first = records + task * chunks * record;
        std::vector<float> o(static_cast<size_t>(a.Dv));
        for (int64_t row = 0; row < rows; ++row) {
          float m = kNothing;
          for (int64_t c = 0; c < chunks; ++c) {
            const float top = first[c * record + row];
            if (!(top <= m)) m = top;  // a NaN stays
          }
          float l = 0;
          std::fill(o.begin(), o.end(), 0.0f);
          for (int64_t c = 0; c < chunks; ++c) {
            const float* part = first + c * record;
            if (part[rows + row] == 0.0f) continue;
            const float weight = part[row] == m ? 1.0f : std::exp(part[row] - m);
            l += weight * part[rows + row];
            const float* x = part + 2 * rows + row * a.Dv;
            for (int64_t j = 0; j < a.Dv; ++j) o[static_cast<size_t>(j)] += weight * x[j];
          }
          finishRow(a, task / a.G, task % a.G, row % a.R, row / a.R, o.data(), m, l);
        }
      },
      a.B * a.G * rows * chunks * a.Dv);
}

}  // namespace

void runAttentionForward(const AttentionArgs& a) {
  if (a.B == 0 || a.S == 0 || a.G == 0 || a.R == 0) return;
  if (a.S * a.R <= kFewRows) {
    forwardFewRows(a);
    return;
  }
  const auto forward = PairFactors::take(a, false) ? forwardBlock<PairFactors> : forwardBlock<WideFactors>;
  const int64_t queries = queryBlock(a, kRows);
  const int64_t blocks = (a.S + queries - 1) / queries;
  parallelFor(a.B * a.G * blocks, [&](int64_t task) {
    // Late queries see most keys under a causal mask: they go first, so that threads end together.
    const int64_t block = blocks - 1 - task / (a.B * a.G);
    const int64_t b = task / a.G % a.B;
    const int64_t begin = block * queries;
    forward(a, b, task % a.G, begin, std::min(begin + queries, a.S));
  });
}

}  // namespace viaduct::cpu
