// Attention backward: probabilities are computed again from lse, block by block. A task is a range of key blocks of one
// (sample, group); dk and dv of a block are whole in it, dq collects in a plane of F32. Few tasks: key blocks are split into
// ranges by shape alone, and their planes of dq are summed in order.
#include <cmath>
#include <vector>

#include "attention.h"
#include "parallel.h"

namespace viaduct::cpu {

namespace {

constexpr int64_t kRows = 128;
constexpr int64_t kEnoughTasks = 16;
constexpr int64_t kMostPlanes = int64_t{64} << 20;  // floats in all planes of dq

struct Scratch {
  float *q, *dOut, *packedQ, *packedDOut, *colsQ, *colsDOut;  // of a block of queries
  float *packedK, *packedV, *colsK, *dk, *dv;                 // of a block of keys
  float *p, *ds, *slope, *packed, *lse, *delta;               // of a pair
  int64_t ld = 0;
};

Scratch takeScratch(const AttentionArgs& a, int64_t rows) {
  const TileShape tile = registerTile();
  const int64_t tall = roundUp(rows, tile.mr),
                keys = std::max(roundUp(kKeyBlock, tile.mr), roundUp(kKeyBlock, tile.nr));
  const int64_t wideD = roundUp(a.D, tile.nr), wideDv = roundUp(a.Dv, tile.nr);
  Scratch s;
  s.ld = roundUp(kKeyBlock, tile.nr);
  struct Want {
    float** place;
    int64_t floats;
  };
  const Want wants[] = {{&s.q, rows * a.D},
                        {&s.dOut, rows * a.Dv},
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
  return s;
}

void writeKeys(const AttentionArgs& a, const HeadsView& x, int64_t b, int64_t g, int64_t from, int64_t to, int64_t n,
               const float* rows) {
  const CastRow narrow = castRow(x.dtype, DType::F32);
  for (int64_t j = from; j < to; ++j, rows += n) narrow(x.at(b, j, g), 1, rows, 1, n);
}

// y[keys, width] += p' x: p[rows, keys], 0 where unseen; x packed by columns over `rows` rows. Keys in groups, each takes the
// rows that see it.
void addSeenBy(float* y, int64_t width, const float* p, int64_t ld, const float* x, int64_t rows, int64_t keys,
               const Visible* see, float* packed) {
  const int64_t nr = registerTile().nr;
  for (int64_t from = 0; from < keys; from += kGroup) {
    const int64_t to = std::min(from + kGroup, keys);
    const auto sees = [&](int64_t row) { return see[row].lo < to && see[row].hi > from; };
    int64_t begin = 0, end = rows;
    while (begin < end && !sees(begin)) ++begin;
    while (begin < end && !sees(end - 1)) --end;
    if (begin == end) continue;
    packRows(packed, {p + begin * ld + from, DType::F32, 1, ld}, to - from, end - begin);
    multiplyPacked(y + from * width, width, packed, x + begin * nr, to - from, width, end - begin, true, nullptr, rows);
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
void backwardKeys(const AttentionArgs& a, int64_t b, int64_t g, int64_t firstBlock, int64_t lastBlock,
                  const float* delta, float* dq) {
  const int64_t queries = queryBlock(a, kRows);
  const Scratch s = takeScratch(a, queries * a.R);
  thread_local std::vector<Visible> see;
  see.resize(static_cast<size_t>(queries * a.R));
  std::vector<Visible> spans;  // of each block of queries
  for (int64_t begin = 0; begin < a.S; begin += queries)
    spans.push_back(visibleSpan(a, b, begin, std::min(begin + queries, a.S)));

  for (int64_t block = firstBlock; block < lastBlock; ++block) {
    const int64_t from = block * kKeyBlock;
    const int64_t to = std::min(from + kKeyBlock, a.K);
    const int64_t n = to - from;
    const MatrixView k{a.k.at(b, from, g), a.k.dtype, a.k.position, 1};
    const MatrixView v{a.v.at(b, from, g), a.v.dtype, a.v.position, 1};
    bool any = false;
    std::fill(s.dk, s.dk + n * a.D, 0.0f);
    std::fill(s.dv, s.dv + n * a.Dv, 0.0f);
    for (int64_t begin = 0; begin < a.S; begin += queries) {
      const int64_t end = std::min(begin + queries, a.S);
      const Visible& span = spans[static_cast<size_t>(begin / queries)];
      if (span.hi <= from || span.lo >= to || !visibleRows(see.data(), a, b, begin, end, from, to)) continue;
      if (!any) {
        packCols(s.packedK, k.transposed(), a.D, n);
        packCols(s.packedV, v.transposed(), a.Dv, n);
        packCols(s.colsK, k, n, a.D);
      }
      const int64_t rows = (end - begin) * a.R;
      gatherRows(s.q, a, a.q, b, g, begin, end, a.D, a.scale);
      gatherRows(s.dOut, a, a.dOut, b, g, begin, end, a.Dv, 1.0f);
      const MatrixView q{s.q, DType::F32, a.D, 1}, dOut{s.dOut, DType::F32, a.Dv, 1};
      packRows(s.packedQ, q, rows, a.D);
      packCols(s.colsQ, q, rows, a.D);
      packRows(s.packedDOut, dOut, rows, a.Dv);
      packCols(s.colsDOut, dOut, rows, a.Dv);
      int64_t row = 0;
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t r = 0; r < a.R; ++r, ++row) s.lse[row] = *a.lseAt(b, g, r, i);
      }
      // p = exp(scale q k' - lse); ds = p (dOut v' - delta)
      multiplySeen(s.p, s.ld, s.packedQ, s.packedK, rows, a.D, see.data());
      probabilitiesBlock(s.p, s.slope, s.ld, rows, n, see.data(), a.softcap, s.lse);
      multiplySeen(s.ds, s.ld, s.packedDOut, s.packedV, rows, a.Dv, see.data());
      scoreGradientsBlock(s.ds, s.p, a.softcap > 0 ? s.slope : nullptr, s.ld, rows, n, see.data(), delta + begin * a.R);
      // dv += p' dOut; dk += ds' (scale q); dq += ds k, scaled at the end
      addSeenBy(s.dv, a.Dv, s.p, s.ld, s.colsDOut, rows, n, see.data(), s.packed);
      addSeenBy(s.dk, a.D, s.ds, s.ld, s.colsQ, rows, n, see.data(), s.packed);
      addSeen(dq + begin * a.R * a.D, a.D, s.ds, s.ld, s.colsK, n, rows, see.data(), s.packed);
      any = true;
    }
    writeKeys(a, a.dk, b, g, from, to, a.D, s.dk);
    writeKeys(a, a.dv, b, g, from, to, a.Dv, s.dv);
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

  if (parts == 1) {
    parallelFor(heads, [&](int64_t head) {
      float* dq = threadScratch(kTileC, plane);
      std::fill(dq, dq + plane, 0.0f);
      backwardKeys(a, head / a.G, head % a.G, 0, blocks, delta.data() + head * a.S * a.R, dq);
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
      backwardKeys(a, head / a.G, head % a.G, block, block + 1, delta.data() + head * a.S * a.R, dq);
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
