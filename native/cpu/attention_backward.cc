// Attention backward: probabilities are computed again from lse, block by block. A task is a range of key blocks of one
// (sample, group); dk and dv of a block are whole in it, dq collects in a plane of F32. Few tasks: key blocks are split into
// ranges by shape alone, and their planes of dq are summed in order.
#include <cmath>
#include <vector>

#include "attention_factors.h"
#include "parallel.h"

namespace viaduct::cpu {

namespace {

constexpr int64_t kRows = 128;
constexpr int64_t kEnoughTasks = 16;
constexpr int64_t kMostPlanes = int64_t{64} << 20;  // floats in all planes of dq

template <typename Element>
struct Scratch {
  Element *q, *dOut, *narrowP, *narrowDs;
  float *packedQ, *packedDOut, *colsQ, *colsDOut;  // of a block of queries
  float *packedK, *packedV, *colsK, *dk, *dv;      // of a block of keys
  float *p, *ds, *slope, *packed, *lse, *delta;    // of a pair
  int64_t ld = 0;
};

template <typename F>
Scratch<typename F::Element> takeScratch(const AttentionArgs& a, int64_t rows) {
  const TileShape tile = registerTile();
  const int64_t tall = roundUp(rows, tile.mr),
                keys = std::max(roundUp(kKeyBlock, tile.mr), roundUp(kKeyBlock, tile.nr));
  const int64_t wideD = roundUp(a.D, tile.nr), wideDv = roundUp(a.Dv, tile.nr);
  using Element = typename F::Element;
  Scratch<Element> s;
  float *q, *dOut, *narrowP, *narrowDs;
  s.ld = roundUp(kKeyBlock, tile.nr);
  struct Want {
    float** place;
    int64_t floats;
  };
  const Want wants[] = {{&q, rows * a.D},
                        {&dOut, rows * a.Dv},
                        {&narrowP, rows * s.ld},
                        {&narrowDs, rows * s.ld},
                        {&s.packedQ, tall * a.D},
                        {&s.packedDOut, tall * a.Dv},
                        {&s.colsQ, rows * wideD},
                        {&s.colsDOut, rows * wideDv},
                        {&s.packedK, keys * a.D},
                        {&s.packedV, keys * a.Dv},
                        {&s.colsK, kKeyBlock * wideD},
                        {&s.dk, kKeyBlock * a.D},
                        {&s.dv, kKeyBlock * a.Dv},
                        {&s.p, rows * s.ld},
                        {&s.ds, rows * s.ld},
                        {&s.slope, rows * s.ld},
                        {&s.packed, kGroup * std::max(tall, keys)},
                        {&s.lse, rows},
                        {&s.delta, rows}};
  int64_t total = 0;
  for (const Want& w : wants) total += roundUp(w.floats, 16);
  float* next = threadScratch(kAttention, total);
  for (const Want& w : wants) {
    *w.place = next;
    next += roundUp(w.floats, 16);
  }
  s.q = reinterpret_cast<Element*>(q);
  s.dOut = reinterpret_cast<Element*>(dOut);
  s.narrowP = reinterpret_cast<Element*>(narrowP);
  s.narrowDs = reinterpret_cast<Element*>(narrowDs);
  return s;
}

void writeKeys(const HeadsView& x, int64_t b, int64_t g, int64_t from, int64_t to, int64_t n, float* rows,
               float scale) {
  const CastRow narrow = castRow(x.dtype, DType::F32);
  for (int64_t j = from; j < to; ++j, rows += n) {
    if (scale != 1.0f) {
      for (int64_t c = 0; c < n; ++c) rows[c] *= scale;
    }
    narrow(x.at(b, j, g), 1, rows, 1, n);
  }
}

// delta[b, g, row] = sum of dOut * out.
void computeDelta(const AttentionArgs& a, float* delta) {
  const CastRow widenG = castRow(DType::F32, a.dOut.dtype), widenO = castRow(DType::F32, a.out.dtype);
  constexpr int64_t kQueries = 64;
  const int64_t blocks = (a.S + kQueries - 1) / kQueries;
  parallelFor(a.B * a.G * blocks, [&](int64_t task) {
    const int64_t g = task / blocks % a.G, b = task / blocks / a.G;
    const int64_t begin = task % blocks * kQueries;
    float* rows = threadScratch(kAttention, 2 * a.Dv);
    for (int64_t i = begin; i < std::min(begin + kQueries, a.S); ++i) {
      for (int64_t r = 0; r < a.R; ++r) {
        widenG(rows, 1, a.dOut.at(b, i, g, r), 1, a.Dv);
        widenO(rows + a.Dv, 1, a.out.at(b, i, g, r), 1, a.Dv);
        delta[((b * a.G + g) * a.S + i) * a.R + r] = dotRow(rows, rows + a.Dv, a.Dv);
      }
    }
  });
}

// Key blocks [firstBlock, lastBlock) of (b, g): writes their dk and dv, adds to dq[S * R, D].
template <typename F>
void backwardKeys(const AttentionArgs& a, int64_t b, int64_t g, int64_t firstBlock, int64_t lastBlock,
                  const float* delta, float* dq) {
  const int64_t queries = queryBlock(a, kRows);
  const auto s = takeScratch<F>(a, queries * a.R);
  thread_local std::vector<Visible> see;
  see.resize(static_cast<size_t>(queries * a.R));
  std::vector<Visible> spans;  // of each block of queries
  for (int64_t begin = 0; begin < a.S; begin += queries)
    spans.push_back(visibleSpan(a, b, begin, std::min(begin + queries, a.S)));

  for (int64_t block = firstBlock; block < lastBlock; ++block) {
    const int64_t from = block * kKeyBlock;
    const int64_t to = std::min(from + kKeyBlock, a.K);
    const int64_t n = to - from;
    const void *k = a.k.at(b, from, g), *v = a.v.at(b, from, g);
    bool any = false;
    std::fill(s.dk, s.dk + n * a.D, 0.0f);
    std::fill(s.dv, s.dv + n * a.Dv, 0.0f);
    for (int64_t begin = 0; begin < a.S; begin += queries) {
      const int64_t end = std::min(begin + queries, a.S);
      const Visible& span = spans[static_cast<size_t>(begin / queries)];
      if (span.hi <= from || span.lo >= to || !visibleRows(see.data(), a, b, begin, end, from, to)) continue;
      if (!any) {
        F::columnsAcross(s.packedK, k, a.k.dtype, a.k.position, a.D, n);
        F::columnsAcross(s.packedV, v, a.v.dtype, a.v.position, a.Dv, n);
        F::columns(s.colsK, k, a.k.dtype, a.k.position, n, a.D);
      }
      const int64_t rows = (end - begin) * a.R;
      F::gather(s.q, a, a.q, b, g, begin, end, a.D, a.scale);
      F::gather(s.dOut, a, a.dOut, b, g, begin, end, a.Dv, 1.0f);
      F::rows(s.packedQ, s.q, a.D, rows, a.D);
      F::columns(s.colsQ, s.q, DType::F32, a.D, rows, a.D);
      F::rows(s.packedDOut, s.dOut, a.Dv, rows, a.Dv);
      F::columns(s.colsDOut, s.dOut, DType::F32, a.Dv, rows, a.Dv);
      int64_t row = 0;
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t r = 0; r < a.R; ++r, ++row) s.lse[row] = *a.lseAt(b, g, r, i);
      }
      // p = exp(scale q k' - lse); ds = p (dOut v' - delta)
      multiplySeen<F>(s.p, s.ld, s.packedQ, s.packedK, rows, a.D, see.data());
      probabilitiesBlock(s.p, s.slope, s.ld, rows, n, see.data(), F::scoreScale(a), a.softcap, s.lse);
      multiplySeen<F>(s.ds, s.ld, s.packedDOut, s.packedV, rows, a.Dv, see.data());
      scoreGradientsBlock(s.ds, s.p, a.softcap > 0 ? s.slope : nullptr, s.ld, rows, n, see.data(), delta + begin * a.R);
      const auto* p = F::narrow(s.p, s.narrowP, rows, n, s.ld);
      const auto* ds = F::narrow(s.ds, s.narrowDs, rows, n, s.ld);
      // dv += p' dOut; dk += ds' q; dq += ds k. What of the scale is not in q yet comes at the end.
      addSeenBy<F>(s.dv, a.Dv, p, s.ld, s.colsDOut, rows, n, see.data(), s.packed);
      addSeenBy<F>(s.dk, a.D, ds, s.ld, s.colsQ, rows, n, see.data(), s.packed);
      addSeen<F>(dq + begin * a.R * a.D, a.D, ds, s.ld, s.colsK, n, rows, see.data(), s.packed);
      any = true;
    }
    writeKeys(a.dk, b, g, from, to, a.D, s.dk, F::scoreScale(a));
    writeKeys(a.dv, b, g, from, to, a.Dv, s.dv, 1.0f);
  }
}

// dq[b, i, g, r, :] = scale * (sum of `parts` planes), in order; planes lie `stride` floats apart.
void writeQueries(const AttentionArgs& a, int64_t b, int64_t g, int64_t begin, int64_t end, float* plane, int64_t parts,
                  int64_t stride) {
  const CastRow narrow = castRow(a.dq.dtype, DType::F32);
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t r = 0; r < a.R; ++r) {
      float* x = plane + (i * a.R + r) * a.D;
      for (int64_t part = 1; part < parts; ++part) {
        for (int64_t j = 0; j < a.D; ++j) x[j] += x[part * stride + j];
      }
      for (int64_t j = 0; j < a.D; ++j) x[j] *= a.scale;
      narrow(a.dq.at(b, i, g, r), 1, x, 1, a.D);
    }
  }
}

}  // namespace

void runAttentionBackward(const AttentionArgs& a) {
  if (a.B == 0 || a.G == 0) return;
  const int64_t blocks = (a.K + kKeyBlock - 1) / kKeyBlock;
  const int64_t heads = a.B * a.G;
  const int64_t plane = a.S * a.R * a.D;
  int64_t parts = std::min(std::max<int64_t>(1, blocks), (kEnoughTasks + heads - 1) / heads);
  if (heads * parts * plane > kMostPlanes) parts = 1;
  std::vector<float> delta(static_cast<size_t>(heads * a.S * a.R));
  computeDelta(a, delta.data());

  const auto backward = PairFactors::take(a, true) ? backwardKeys<PairFactors> : backwardKeys<WideFactors>;
  if (parts == 1) {
    parallelFor(heads, [&](int64_t head) {
      float* dq = threadScratch(kTileC, plane);
      std::fill(dq, dq + plane, 0.0f);
      backward(a, head / a.G, head % a.G, 0, blocks, delta.data() + head * a.S * a.R, dq);
      writeQueries(a, head / a.G, head % a.G, 0, a.S, dq, 1, 0);
    });
    return;
  }
  float* planes = threadScratch(kOperation, heads * parts * plane);
  parallelFor(heads * parts, [&](int64_t task) {
    // Early keys have most queries under a causal mask: a part takes every parts-th block, so that parts weigh alike.
    const int64_t head = task / parts;
    float* dq = planes + task * plane;
    std::fill(dq, dq + plane, 0.0f);
    for (int64_t block = task % parts; block < blocks; block += parts)
      backward(a, head / a.G, head % a.G, block, block + 1, delta.data() + head * a.S * a.R, dq);
  });
  constexpr int64_t kQueries = 64;
  const int64_t pieces = (a.S + kQueries - 1) / kQueries;
  parallelFor(heads * pieces, [&](int64_t task) {
    const int64_t head = task / pieces, begin = task % pieces * kQueries;
    writeQueries(a, head / a.G, head % a.G, begin, std::min(begin + kQueries, a.S), planes + head * parts * plane,
                 parts, plane);
  });
}

}  // namespace viaduct::cpu
