// Attention forward: a block of rows takes tile after tile of keys with a running softmax. Where rows are few (decoding), keys
// are split among blocks, whose results a second kernel joins in order. Tiles and parts are cut by shape alone.
#include "../attention.h"
#include "../attention_tile.cuh"

namespace viaduct::cuda {

namespace {

constexpr int kFewRows = 16;

/// Each thread has kRowsEach rows by kKeysEach keys of the scores.
template <int kWidth, int kRowsEach>
struct Tile {
  static constexpr int kKeysEach = kWidth > kNarrow ? 2 : 4;
  static constexpr int kRowGroups = kWidth > kNarrow&& kRowsEach > 1 ? 8 : 16;
  static constexpr int kThreads = kRowGroups * kLanes;
  static constexpr int kRows = kRowGroups * kRowsEach;
  static constexpr int kKeys = kLanes * kKeysEach;
  static constexpr int kStride = kKeys + 4;  // of the probabilities
  static constexpr int kFours = kWidth / kColumnsAtOnce;

  static size_t sharedBytes(const AttentionArgs& a) {
    const int most = std::max(tileStride(a.D), tileStride(a.Dv));
    return sizeof(float) * (size_t{kRows} * tileStride(a.D) + size_t{kKeys} * most + size_t{kRows} * kStride);
  }
};

/// Keys are split into `count` parts of `keys` each, whose results wait here. count 1: none.
struct Parts {
  int count = 1;
  int keys = 0;
  float* o = nullptr;      // [B * G, count, rows, Dv]
  float* stats = nullptr;  // [B * G, count, rows, 2]: maximum, sum

  __device__ int64_t record(int64_t head, int part, int rows, int row) const {
    return (head * count + part) * rows + row;
  }
};

/// out = o / l and lse = m + log(l), zeros and -inf where nothing was seen: what a row's l, m say.
__device__ __forceinline__ float inverseOf(float l) { return l == 0.0f ? 0.0f : 1.0f / l; }
__device__ __forceinline__ float lseOf(float m, float l) { return l == 0.0f ? kUnseen : m + logf(l); }

template <typename T, int kWidth, int kRowsEach>
__global__ void __launch_bounds__(Tile<kWidth, kRowsEach>::kThreads)
    forwardKernel(AttentionArgs a, AttentionPacks packs, Parts parts) {
  using Tiles = Tile<kWidth, kRowsEach>;
  constexpr int kThreads = Tiles::kThreads, kKeysEach = Tiles::kKeysEach, kFours = Tiles::kFours;
  const int tx = threadIdx.x % kLanes, ty = threadIdx.x / kLanes;
  const int D = static_cast<int>(a.D), Dv = static_cast<int>(a.Dv);
  Place at = placeOf(a);
  at.tile = static_cast<int>(gridDim.x) / static_cast<int>(a.B * a.G) - 1 - at.tile;  // late rows see most keys
  const int row0 = at.tile * Tiles::kRows;
  const int myRow = row0 + ty * kRowsEach;

  float* q = dynamicShared<float>();
  float* keys = q + Tiles::kRows * tileStride(D);  // then values
  float* p = keys + Tiles::kKeys * max(tileStride(D), tileStride(Dv)) + ty * kRowsEach * Tiles::kStride;

  Seen seen[kRowsEach];
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) seen[i] = seenBy(a, at.b, myRow + i);
  Seen span = seenByBlock<kThreads>(seen);
  if (parts.count > 1) {
    const int begin = static_cast<int>(blockIdx.y) * parts.keys;
    span.lo = max(span.lo, begin);
    span.hi = min(span.hi, begin + parts.keys);
  }

  float m[kRowsEach], l[kRowsEach] = {}, o[kRowsEach][kFours][4] = {};
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) m[i] = kUnseen;

  if (span.lo < span.hi) {
    loadTile<kThreads, T>(q, Tiles::kRows, D, packs.q, a.scale,
                          [&](int i) { return rowOf<const T>(a, a.q, at, row0 + i); });
  }
  for (int from = span.lo / Tiles::kKeys * Tiles::kKeys; from < span.hi; from += Tiles::kKeys) {
    const auto inSpan = [&](int j) { return from + j >= span.lo && from + j < span.hi; };
    __syncthreads();  // the last values are used
    loadTile<kThreads, T>(keys, Tiles::kKeys, D, packs.k, 1.0f,
                          [&](int j) { return inSpan(j) ? a.k.row<const T>(at.b, from + j, at.g) : nullptr; });
    __syncthreads();
    float s[kRowsEach][kKeysEach];
    multiplyRows(s, q + ty * kRowsEach * tileStride(D), keys + tx * tileStride(D), tileStride(D), tileColumns(D));

#pragma unroll
    for (int i = 0; i < kRowsEach; ++i) {
      float top = kUnseen;
#pragma unroll
      for (int j = 0; j < kKeysEach; ++j) {
        const int key = from + tx + j * kLanes;
        if (a.softcap > 0) s[i][j] = a.softcap * tanhf(s[i][j] / a.softcap);
        if (key < max(seen[i].lo, span.lo) || key >= min(seen[i].hi, span.hi)) s[i][j] = kUnseen;
        top = fmaxf(top, s[i][j]);
      }
      top = fmaxf(rowMax(top), m[i]);
      const float shift = top == kUnseen ? 0.0f : top;
      const float correction = m[i] == kUnseen ? 0.0f : expf(m[i] - shift);
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kKeysEach; ++j) {
        const float e = expf(s[i][j] - shift);
        sum += e;
        p[i * Tiles::kStride + tx + j * kLanes] = e;
      }
      l[i] = l[i] * correction + sum;  // of this thread's keys
      m[i] = top;
#pragma unroll
      for (int c = 0; c < kFours; ++c) {
#pragma unroll
        for (int k = 0; k < 4; ++k) o[i][c][k] *= correction;
      }
    }
    __syncthreads();  // keys are used, probabilities are there
    loadTile<kThreads, T>(keys, Tiles::kKeys, Dv, packs.v, 1.0f,
                          [&](int j) { return inSpan(j) ? a.v.row<const T>(at.b, from + j, at.g) : nullptr; });
    __syncthreads();
    addProduct(o, p, Tiles::kStride, keys, Dv, Tiles::kKeys);
  }

  const int rows = static_cast<int>(a.S * a.R);
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) {
    const int row = myRow + i;
    const float sum = rowSum(l[i]);
    if (row >= rows) continue;
    if (parts.count > 1) {
      const int64_t record = parts.record(at.head, static_cast<int>(blockIdx.y), rows, row);
      if (tx == 0) {
        parts.stats[2 * record] = m[i];
        parts.stats[2 * record + 1] = sum;
      }
      if (sum == 0.0f) continue;
#pragma unroll
      for (int c = 0; c < kFours; ++c) {
        storeFour(parts.o + record * Dv, 4 * tx + c * kColumnsAtOnce, Dv, Dv % 4 == 0, o[i][c]);
      }
      continue;
    }
    const float inverse = inverseOf(sum);
    T* out = rowOf<T>(a, a.out, at, row);
#pragma unroll
    for (int c = 0; c < kFours; ++c) {
#pragma unroll
      for (int k = 0; k < 4; ++k) o[i][c][k] = sum == 0.0f ? 0.0f : o[i][c][k] * inverse;
      storeFour(out, 4 * tx + c * kColumnsAtOnce, Dv, packs.out, o[i][c]);
    }
    if (tx == 0) *a.lseAt(at.b, at.g, row % a.R, row / a.R) = lseOf(m[i], sum);
  }
}

constexpr int kJoinThreads = 64;

/// A block joins the parts of one row.
template <typename T>
__global__ void __launch_bounds__(kJoinThreads) joinPartsKernel(AttentionArgs a, Parts parts) {
  const int rows = static_cast<int>(a.S * a.R);
  const int row = static_cast<int>(blockIdx.x) % rows, head = static_cast<int>(blockIdx.x) / rows;
  const int groups = static_cast<int>(a.G);
  const Place at{head / groups, head % groups, head, 0};
  float m = kUnseen;
  for (int part = 0; part < parts.count; ++part) m = fmaxf(m, parts.stats[2 * parts.record(head, part, rows, row)]);
  T* out = rowOf<T>(a, a.out, at, row);
  float l = 0;
  for (int column = threadIdx.x; column < a.Dv || column < kJoinThreads; column += kJoinThreads) {
    float o = 0;
    l = 0;
    for (int part = 0; part < parts.count; ++part) {
      const int64_t record = parts.record(head, part, rows, row);
      const float sum = parts.stats[2 * record + 1];
      if (sum == 0.0f) continue;
      const float weight = expf(parts.stats[2 * record] - (m == kUnseen ? 0.0f : m));
      l += weight * sum;
      if (column < a.Dv) o += weight * parts.o[record * a.Dv + column];
    }
    if (column < a.Dv) out[column] = narrow<T>(l == 0.0f ? 0.0f : o * inverseOf(l));
  }
  if (threadIdx.x == 0) *a.lseAt(at.b, at.g, row % a.R, row / a.R) = lseOf(m, l);
}

/// How keys are split: only for rows of one tile, so that about kEnoughBlocks are at work.
Parts partsOf(const AttentionArgs& a) {
  constexpr int64_t kEnoughBlocks = 512, kLeast = 128, kTile = 64;
  Parts parts;
  const int64_t heads = a.B * a.G, rows = a.S * a.R;
  if (heads == 0 || rows == 0 || rows > 2 * kFewRows) return parts;
  const int64_t keys = a.causal ? std::min(a.K, a.queryOffset + a.S) : a.K;
  const int64_t most = std::min((kEnoughBlocks + heads - 1) / heads, (keys + kLeast - 1) / kLeast);
  if (most <= 1) return parts;
  const int64_t each = ((keys + most - 1) / most + kTile - 1) / kTile * kTile;
  parts.keys = static_cast<int>(each);
  parts.count = static_cast<int>((keys + each - 1) / each);
  return parts;
}

size_t recordsOf(const AttentionArgs& a, const Parts& parts) {
  return parts.count <= 1 ? 0 : static_cast<size_t>(a.B * a.G * parts.count * a.S * a.R);
}

template <typename T, int kWidth, int kRowsEach>
void startTiles(const AttentionArgs& a, const Launch& on, const Parts& parts) {
  using Tiles = Tile<kWidth, kRowsEach>;
  const int64_t tiles = (a.S * a.R + Tiles::kRows - 1) / Tiles::kRows;
  const dim3 grid(static_cast<unsigned>(tiles * a.B * a.G), static_cast<unsigned>(parts.count));
  on.shared(Tiles::sharedBytes(a))(forwardKernel<T, kWidth, kRowsEach>, grid, Tiles::kThreads, a, packsOf(a), parts);
}

}  // namespace

size_t ownForwardScratch(const AttentionArgs& a) {
  return recordsOf(a, partsOf(a)) * static_cast<size_t>(a.Dv + 2) * sizeof(float);
}

void startOwnForward(const AttentionArgs& a, const Launch& on, void* scratch) {
  Parts parts = partsOf(a);
  const size_t records = recordsOf(a, parts);
  parts.o = static_cast<float*>(scratch);
  parts.stats = parts.o + records * static_cast<size_t>(a.Dv);
  const bool few = a.S * a.R <= kFewRows;
  const bool wide = a.D > kNarrow || a.Dv > kNarrow;
  dispatchFloat(a.q.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (wide) {
      few ? startTiles<T, kWide, 1>(a, on, parts) : startTiles<T, kWide, 4>(a, on, parts);
    } else {
      few ? startTiles<T, kNarrow, 1>(a, on, parts) : startTiles<T, kNarrow, 4>(a, on, parts);
    }
    if (parts.count > 1) {
      on(joinPartsKernel<T>, static_cast<unsigned>(a.B * a.G * a.S * a.R), kJoinThreads, a, parts);
    }
  });
}

}  // namespace viaduct::cuda
