// Attention backward, in three kernels: delta = rowsum(dOut * out); dk and dv by blocks of keys, which take tile after tile of
// rows; dq by blocks of rows, which take tile after tile of keys. Probabilities are computed again from lse in both. Each
// result has one writer and sums run in order, so that equal inputs give equal bits.
#include "../attention.h"
#include "../attention_tile.cuh"
#include "../reduce.cuh"

namespace viaduct::cuda {

namespace {

constexpr int kThreads = 256;

/// Rows by keys of a tile; each thread has kEach by kEach scores.
template <int kWidth>
struct Tile {
  static constexpr int kEach = kWidth > kNarrow ? 1 : 2;
  static constexpr int kSize = kLanes * kEach;
  static constexpr int kStride = kSize + 4;  // of probabilities
  static constexpr int kFours = kWidth / kColumnsAtOnce;

  static size_t sharedBytes(const AttentionArgs& a) {
    return sizeof(float) * 2 * kSize * (size_t{1} * tileStride(a.D) + tileStride(a.Dv) + kStride);
  }
};

constexpr int kDeltaRows = kThreads / kWarp;  // of a block

/// delta[head, row]: a warp sums a row.
template <typename T>
__global__ void __launch_bounds__(kThreads) deltaKernel(float* delta, AttentionArgs a, bool packs) {
  const int rows = static_cast<int>(a.S * a.R), lane = threadIdx.x % kWarp;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kDeltaRows + threadIdx.x / kWarp;
  if (index >= a.B * a.G * rows) return;
  const int64_t head = index / rows;
  const Place at{head / a.G, head % a.G, 0, 0};
  const int row = static_cast<int>(index % rows);
  const T* x = rowOf<const T>(a, a.dOut, at, row);
  const T* y = rowOf<const T>(a, a.out, at, row);
  float sum = 0;
  if (packs) {
    constexpr int W = kPackOf<T>;
    for (int c = lane * W; c < a.Dv; c += kWarp * W) {
      float u[W], v[W];
      widenAll(*reinterpret_cast<const Pack<T, W>*>(x + c), u);
      widenAll(*reinterpret_cast<const Pack<T, W>*>(y + c), v);
#pragma unroll
      for (int k = 0; k < W; ++k) sum += u[k] * v[k];
    }
  } else {
    for (int c = lane; c < a.Dv; c += kWarp) sum += widen(x[c]) * widen(y[c]);
  }
  sum = warpSum(sum);
  if (lane == 0) delta[index] = sum;
}

/// What a thread knows of a row.
struct Row {
  float lse, delta;
};

__device__ __forceinline__ Row rowFacts(const AttentionArgs& a, const Place& at, const float* delta, int row) {
  const int rows = static_cast<int>(a.S * a.R);
  if (row >= rows) return {0, 0};
  return {*a.lseAt(at.b, at.g, row % a.R, row / a.R), delta[static_cast<int64_t>(at.head) * rows + row]};
}

/// Tiles of a pair in shared memory.
struct Shared {
  float *q, *dOut, *k, *v;
};

/// p = exp(score - lse) and ds = p (dOut . v - delta), by softcap's slope, of the thread's rows and keys; 0 where unseen.
template <int kEach>
__device__ __forceinline__ void gradientOfScores(float (&p)[kEach][kEach], float (&ds)[kEach][kEach],
                                                 const AttentionArgs& a, const Shared& tiles, const Row (&rows)[kEach],
                                                 const Seen (&seen)[kEach], int from) {
  const int tx = threadIdx.x % kLanes, ty = threadIdx.x / kLanes;
  const int stride = tileStride(a.D), strideV = tileStride(a.Dv);
  multiplyRows(p, tiles.q + ty * kEach * stride, tiles.k + tx * stride, stride, tileColumns(a.D));
  multiplyRows(ds, tiles.dOut + ty * kEach * strideV, tiles.v + tx * strideV, strideV, tileColumns(a.Dv));
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int key = from + tx + j * kLanes;
      float score = p[i][j], slope = 1;
      if (a.softcap > 0) {
        const float t = tanhf(score / a.softcap);
        score = a.softcap * t;
        slope = 1 - t * t;
      }
      const bool sees = key >= seen[i].lo && key < seen[i].hi;
      p[i][j] = sees ? expf(score - rows[i].lse) : 0.0f;
      ds[i][j] = sees ? p[i][j] * (ds[i][j] - rows[i].delta) * slope : 0.0f;
    }
  }
}

template <int kEach>
__device__ __forceinline__ void storeScores(float* tile, int stride, const float (&x)[kEach][kEach]) {
  const int tx = threadIdx.x % kLanes, ty = threadIdx.x / kLanes;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) tile[(ty * kEach + i) * stride + tx + j * kLanes] = x[i][j];
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) keysKernel(AttentionArgs a, AttentionPacks packs, const float* delta) {
  using Tiles = Tile<kWidth>;
  constexpr int kEach = Tiles::kEach, kFours = Tiles::kFours, kSize = Tiles::kSize;
  const int tx = threadIdx.x % kLanes, ty = threadIdx.x / kLanes;
  const int D = static_cast<int>(a.D), Dv = static_cast<int>(a.Dv);
  const Place at = placeOf(a);
  const int from = at.tile * kSize;
  const int to = static_cast<int>(min(a.K, static_cast<int64_t>(from + kSize)));

  Shared tiles;
  tiles.k = dynamicShared<float>();
  tiles.v = tiles.k + kSize * tileStride(D);
  tiles.q = tiles.v + kSize * tileStride(Dv);
  tiles.dOut = tiles.q + kSize * tileStride(D);
  float* p = tiles.dOut + kSize * tileStride(Dv);
  float* ds = p + kSize * Tiles::kStride;
  loadTile<kThreads, T>(tiles.k, kSize, D, packs.k, 1.0f,
                        [&](int j) { return from + j < to ? a.k.row<const T>(at.b, from + j, at.g) : nullptr; });
  loadTile<kThreads, T>(tiles.v, kSize, Dv, packs.v, 1.0f,
                        [&](int j) { return from + j < to ? a.v.row<const T>(at.b, from + j, at.g) : nullptr; });

  // Queries that may see one of the keys.
  const int64_t first = a.causal ? max(int64_t{0}, from - a.queryOffset) : 0;
  const int64_t last = a.window > 0 ? min(a.S, to - 1 + a.window - a.queryOffset) : a.S;
  float dk[kEach][kFours][4] = {}, dv[kEach][kFours][4] = {};
  for (int64_t begin = first * a.R / kSize * kSize; begin < last * a.R; begin += kSize) {
    const int row0 = static_cast<int>(begin);
    Row rows[kEach];
    Seen seen[kEach];
    bool sees = false;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = row0 + ty * kEach + i;
      rows[i] = rowFacts(a, at, delta, row);
      seen[i] = seenBy(a, at.b, row);
      seen[i].hi = min(seen[i].hi, to);
      sees = sees || max(seen[i].lo, from) < seen[i].hi;
    }
    if (!__syncthreads_or(sees)) continue;  // behind it the last tile of rows is used, too
    loadTile<kThreads, T>(tiles.q, kSize, D, packs.q, a.scale,
                          [&](int i) { return rowOf<const T>(a, a.q, at, row0 + i); });
    loadTile<kThreads, T>(tiles.dOut, kSize, Dv, packs.dOut, 1.0f,
                          [&](int i) { return rowOf<const T>(a, a.dOut, at, row0 + i); });
    __syncthreads();
    float mineP[kEach][kEach], mineDs[kEach][kEach];
    gradientOfScores(mineP, mineDs, a, tiles, rows, seen, from);
    storeScores(p, Tiles::kStride, mineP);
    storeScores(ds, Tiles::kStride, mineDs);
    __syncthreads();
    addTransposed(dv, p + ty * kEach, Tiles::kStride, tiles.dOut, Dv, kSize);
    addTransposed(dk, ds + ty * kEach, Tiles::kStride, tiles.q, D, kSize);  // q holds scale
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int key = from + ty * kEach + i;
    if (key >= to) continue;
    T* dkRow = a.dk.row<T>(at.b, key, at.g);
    T* dvRow = a.dv.row<T>(at.b, key, at.g);
#pragma unroll
    for (int c = 0; c < kFours; ++c) {
      const int column = 4 * tx + c * kColumnsAtOnce;
      storeFour(dkRow, column, D, packs.dk, dk[i][c]);
      storeFour(dvRow, column, Dv, packs.dv, dv[i][c]);
    }
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) queriesKernel(AttentionArgs a, AttentionPacks packs, const float* delta) {
  using Tiles = Tile<kWidth>;
  constexpr int kEach = Tiles::kEach, kFours = Tiles::kFours, kSize = Tiles::kSize;
  const int tx = threadIdx.x % kLanes, ty = threadIdx.x / kLanes;
  const int D = static_cast<int>(a.D), Dv = static_cast<int>(a.Dv);
  Place at = placeOf(a);
  at.tile = static_cast<int>(gridDim.x) / static_cast<int>(a.B * a.G) - 1 - at.tile;  // late rows see most keys
  const int row0 = at.tile * kSize;

  Shared tiles;
  tiles.q = dynamicShared<float>();
  tiles.dOut = tiles.q + kSize * tileStride(D);
  tiles.k = tiles.dOut + kSize * tileStride(Dv);
  tiles.v = tiles.k + kSize * tileStride(D);
  float* ds = tiles.v + kSize * tileStride(Dv);
  Row rows[kEach];
  Seen seen[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    rows[i] = rowFacts(a, at, delta, row0 + ty * kEach + i);
    seen[i] = seenBy(a, at.b, row0 + ty * kEach + i);
  }
  const Seen span = seenByBlock<kThreads>(seen);
  loadTile<kThreads, T>(tiles.q, kSize, D, packs.q, a.scale,
                        [&](int i) { return rowOf<const T>(a, a.q, at, row0 + i); });
  loadTile<kThreads, T>(tiles.dOut, kSize, Dv, packs.dOut, 1.0f,
                        [&](int i) { return rowOf<const T>(a, a.dOut, at, row0 + i); });

  float dq[kEach][kFours][4] = {};
  for (int from = span.lo / kSize * kSize; from < span.hi; from += kSize) {
    const auto inSpan = [&](int j) { return from + j >= span.lo && from + j < span.hi; };
    __syncthreads();  // the last keys are used
    loadTile<kThreads, T>(tiles.k, kSize, D, packs.k, 1.0f,
                          [&](int j) { return inSpan(j) ? a.k.row<const T>(at.b, from + j, at.g) : nullptr; });
    loadTile<kThreads, T>(tiles.v, kSize, Dv, packs.v, 1.0f,
                          [&](int j) { return inSpan(j) ? a.v.row<const T>(at.b, from + j, at.g) : nullptr; });
    __syncthreads();
    float mineP[kEach][kEach], mineDs[kEach][kEach];
    gradientOfScores(mineP, mineDs, a, tiles, rows, seen, from);
    storeScores(ds, Tiles::kStride, mineDs);
    __syncwarp();  // a row is of one warp
    addProduct(dq, ds + ty * kEach * Tiles::kStride, Tiles::kStride, tiles.k, D, kSize);
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    T* row = rowOf<T>(a, a.dq, at, row0 + ty * kEach + i);
    if (row == nullptr) continue;
#pragma unroll
    for (int c = 0; c < kFours; ++c) {
#pragma unroll
      for (int k = 0; k < 4; ++k) dq[i][c][k] *= a.scale;
      storeFour(row, 4 * tx + c * kColumnsAtOnce, D, packs.dq, dq[i][c]);
    }
  }
}

template <typename T, int kWidth>
void startTiles(const AttentionArgs& a, const Launch& on, const float* delta) {
  using Tiles = Tile<kWidth>;
  const auto blocks = [&](int64_t n) {
    return static_cast<unsigned>((n + Tiles::kSize - 1) / Tiles::kSize * a.B * a.G);
  };
  const Launch with = on.shared(Tiles::sharedBytes(a));
  with(keysKernel<T, kWidth>, blocks(a.K), kThreads, a, packsOf(a), delta);
  with(queriesKernel<T, kWidth>, blocks(a.S * a.R), kThreads, a, packsOf(a), delta);
}

}  // namespace

size_t ownBackwardScratch(const AttentionArgs& a) { return static_cast<size_t>(a.B * a.G * a.S * a.R) * sizeof(float); }

void startOwnBackward(const AttentionArgs& a, const Launch& on, void* scratch) {
  float* delta = static_cast<float*>(scratch);
  const AttentionPacks packs = packsOf(a);
  const int64_t rows = a.B * a.G * a.S * a.R;
  dispatchFloat(a.q.dtype, [&](auto zero) {
    using T = decltype(zero);
    on(deltaKernel<T>, static_cast<unsigned>((rows + kDeltaRows - 1) / kDeltaRows), kThreads, delta, a,
       packs.out && packs.dOut);
    a.D > kNarrow || a.Dv > kNarrow ? startTiles<T, kWide>(a, on, delta) : startTiles<T, kNarrow>(a, on, delta);
  });
}

}  // namespace viaduct::cuda
