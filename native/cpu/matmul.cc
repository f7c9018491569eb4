// The op matmul and its cut into tiles. Tiles depend on the shape alone and each is computed by one thread, so results do
// not depend on the number of threads. Kernels stand in matmul_kernel.cc, oneDNN's calls in matmul_onednn.cc.
#include "matmul.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "../checks/ops.h"
#include "cast.h"
#include "cpu_backend.h"
#include "pair_kernel.h"
#include "parallel.h"

namespace viaduct::cpu {

namespace {

enum class Engine { Auto, Builtin, OneDnn };
std::atomic<Engine> engine{Engine::Auto};

bool usesOneDnn(DType dtype) {
  switch (engine.load(std::memory_order_relaxed)) {
    case Engine::Builtin:
      return false;
    case Engine::OneDnn:
      return onednn::available(dtype);
    default:
      // F32: the built-in tiles run as fast and pack bias, dtype and edges in one pass. BF16: only oneDNN has dot products of it.
      return dtype == DType::BF16 && onednn::available(dtype);
  }
}

char* elementAt(void* data, DType dtype, int64_t index) {
  return static_cast<char*>(data) + index * static_cast<int64_t>(dtypeBytes(dtype));
}

// y[n] = x[n], F32.
void loadRow(float* y, const void* x, DType dtype, int64_t stride, int64_t n) {
  castRow(DType::F32, dtype)(y, 1, x, stride, n);
}

// y row = (accumulate ? y : 0) + x, in y's dtype. x is overwritten.
void writeRow(const MatmulArgs& g, int64_t row, int64_t col, float* x, int64_t n) {
  char* y = elementAt(g.y, g.yDtype, row * g.ldy + col);
  if (g.accumulate) {
    constexpr int64_t kPiece = 256;
    float old[kPiece];
    for (int64_t j = 0; j < n; j += kPiece) {
      const int64_t w = std::min(kPiece, n - j);
      loadRow(old, y + j * static_cast<int64_t>(dtypeBytes(g.yDtype)), g.yDtype, 1, w);
      for (int64_t e = 0; e < w; ++e) x[j + e] += old[e];
    }
  }
  castRow(g.yDtype, DType::F32)(y, 1, x, 1, n);
}

void tile(float* c, int64_t ldc, const MatmulArgs& g, int64_t row, int64_t col, int64_t m, int64_t n, int64_t k0,
          int64_t k, bool add, const float* bias) {
  const MatrixView a = g.a.at(row, k0);
  const MatrixView b = g.b.at(k0, col);
  const bool pairs = g.rowsVary && engine.load(std::memory_order_relaxed) == Engine::Auto && inPairs(a, b, k);
  if (pairs || (k > 0 && usesOneDnn(a.dtype))) {
    pairs ? multiplyPairsOf(c, ldc, a, b, m, n, k, add) : onednn::multiplyTile(c, ldc, a, b, m, n, k, add);
    if (bias != nullptr) {
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) c[i * ldc + j] += bias[j];
      }
    }
  } else {
    multiplyTile(c, ldc, a, b, m, n, k, add, bias);
  }
}

// Tiles in a column. A last row joins the tile above: oneDNN sums a single row in another order than rows beside others.
int64_t tilesDown(const MatmulArgs& g, const MatmulCut& cut) {
  return std::max<int64_t>(1, (g.m + cut.mt - 2) / cut.mt);
}
int64_t rowsOfTile(const MatmulArgs& g, const MatmulCut& cut, int64_t row) {
  const int64_t left = g.m - row;
  return left <= cut.mt + 1 ? left : cut.mt;
}

int64_t tileCount(const MatmulArgs& g, const MatmulCut& cut) {
  return tilesDown(g, cut) * ((g.n + cut.nt - 1) / cut.nt);
}

void runTile(const MatmulArgs& g, const MatmulCut& cut, const float* bias, int64_t task) {
  // Down a column of tiles first: neighbours in time share the columns of b.
  const int64_t rows = tilesDown(g, cut);
  const int64_t row = task % rows * cut.mt;
  const int64_t col = task / rows * cut.nt;
  const int64_t m = rowsOfTile(g, cut, row);
  const int64_t n = std::min(cut.nt, g.n - col);
  const float* b = bias != nullptr ? bias + col : nullptr;
  if (g.yDtype == DType::F32) {
    tile(static_cast<float*>(g.y) + row * g.ldy + col, g.ldy, g, row, col, m, n, 0, g.k, g.accumulate, b);
    return;
  }
  float* c = threadScratch(kTileC, m * n);
  tile(c, n, g, row, col, m, n, 0, g.k, false, b);
  for (int64_t i = 0; i < m; ++i) writeRow(g, row + i, col, c + i * n, n);
}

// Few tiles and a long k: parts of k go to F32 planes, which are then summed in order.
void runParts(const MatmulArgs& g, const MatmulCut& cut, const float* bias) {
  const int64_t rows = tilesDown(g, cut);
  const int64_t cols = (g.n + cut.nt - 1) / cut.nt;
  const int64_t length = roundUp((g.k + cut.parts - 1) / cut.parts, 8);
  const int64_t parts = (g.k + length - 1) / length;
  const int64_t plane = g.m * g.n;
  float* planes = threadScratch(kOperation, parts * plane);
  parallelFor(rows * cols * parts, [&](int64_t task) {
    const int64_t part = task % parts;
    const int64_t row = task / parts % rows * cut.mt;
    const int64_t col = task / parts / rows * cut.nt;
    const int64_t k0 = part * length;
    tile(planes + part * plane + row * g.n + col, g.n, g, row, col, rowsOfTile(g, cut, row),
         std::min(cut.nt, g.n - col), k0, std::min(length, g.k - k0), false,
         part == 0 && bias != nullptr ? bias + col : nullptr);
  });
  parallelChunks(g.m, std::max<int64_t>(1, 16384 / g.n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* x = planes + i * g.n;
      for (int64_t part = 1; part < parts; ++part) {
        const float* next = x + part * plane;
        for (int64_t j = 0; j < g.n; ++j) x[j] += next[j];
      }
      writeRow(g, i, 0, x, g.n);
    }
  });
}

// Rows of decoding: memory-bound, so weights are read once, in their own dtype, without packing.
constexpr int64_t kFewRows = 16;
static_assert(kFewRows < kLeastSharedRows);

// Up to here a row of weights is read faster alone than beside others, and arithmetic does not bound (matmul_rows.cc).
constexpr int64_t kStreamedRows = 3;

void runFewRows(const MatmulArgs& g, const float* bias) {
  const bool pairs = multipliesPairs() && g.a.dtype == DType::BF16 && g.b.dtype == DType::BF16 && g.a.colStride == 1 &&
                     g.m > kStreamedRows;
  const bool direct = g.a.dtype == DType::F32 && g.a.colStride == 1;
  const float* x = static_cast<const float*>(g.a.data);
  int64_t ldx = g.a.rowStride;
  if (!direct && !pairs) {
    ldx = roundUp(g.k, 16);
    float* copy = threadScratch(kOperation, g.m * ldx);
    for (int64_t i = 0; i < g.m; ++i) {
      loadRow(copy + i * ldx, g.a.at(i, 0).data, g.a.dtype, g.a.colStride, g.k);
      orderForWeights(copy + i * ldx, g.k, g.b.dtype);
    }
    x = copy;
  }
  // Weights a task: more rows have more to do with each. Columns come by fours, or by threes.
  const int64_t weights = g.m > kStreamedRows ? 1 << 14 : 1 << 15;
  const int64_t grain = roundUp(std::max<int64_t>(16, weights / g.k), 12);
  parallelChunks(g.n, grain, [&](int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    const float* b = bias != nullptr ? bias + begin : nullptr;
    const auto multiply = [&](float* c, int64_t ldc, bool add) {
      const MatrixView weights = g.b.at(0, begin);
      if (!pairs) return multiplyFewRows(c, ldc, x, ldx, weights, g.m, n, g.k, add, b);
      multiplyFewPairs(c, ldc, static_cast<const uint16_t*>(g.a.data), g.a.rowStride,
                       static_cast<const uint16_t*>(weights.data), weights.colStride, g.m, n, g.k, add, b);
    };
    if (g.yDtype == DType::F32) return multiply(static_cast<float*>(g.y) + begin, g.ldy, g.accumulate);
    float* c = threadScratch(kTileC, g.m * n);
    multiply(c, n, false);
    for (int64_t i = 0; i < g.m; ++i) writeRow(g, i, begin, c + i * n, n);
  });
}

// Weights that are contiguous along k, for so few rows that they are read once as they lie.
bool hasFewRows(const MatmulArgs& g) { return std::max(g.m, g.wholeRows) <= kFewRows && g.b.rowStride == 1 && g.k > 0; }

}  // namespace

MatmulCut cutMatmul(int64_t m, int64_t n, int64_t k) {
  // Time of a cut over that of the multiplications alone, from measured rates: packing an element costs about as much as
  // 8 multiplications and an element of a partial sum as 50; idle threads are weighed for teams of 2, 4 and 8.
  MatmulCut best;
  double least = 0;
  int64_t lastRows = 0;
  // 192 packed rows x 320 fit a second-level cache of 256 KiB; heights are multiples of every register tile's.
  for (const int64_t height : {192, 144, 96, 60, 36, 12}) {
    const int64_t rows = (m + height - 1) / height;
    if (rows == lastRows) continue;
    lastRows = rows;
    const int64_t mt = roundUp((m + rows - 1) / rows, 12);
    int64_t lastCols = 0;
    for (const int64_t width : {512, 384, 256, 192, 128, 64}) {
      const int64_t cols = (n + width - 1) / width;
      if (cols == lastCols) continue;
      lastCols = cols;
      const int64_t nt = roundUp((n + cols - 1) / cols, 32);
      for (const int64_t parts : {1, 2, 3, 4, 6, 8, 12, 16}) {
        if (parts > 1 && k / parts < 256) break;
        const auto tasks = static_cast<double>(rows * cols * parts);
        const auto idle = [&](int team) { return std::ceil(tasks / team) * team / tasks - 1; };
        const double packing = 8.0 / static_cast<double>(mt) + 8.0 / static_cast<double>(nt);
        const double sums = parts > 1 ? 50.0 * static_cast<double>(parts) / static_cast<double>(k) : 0.0;
        const double cost = (1 + 0.4 * idle(2) + 0.2 * idle(4) + 0.1 * idle(8)) * (1 + packing) + sums;
        if (best.mt == 0 || cost < least) {
          least = cost;
          best = {mt, nt, parts};
        }
      }
    }
  }
  return best;
}

void runMatmul(const MatmulArgs& g) {
  if (g.m == 0 || g.n == 0) return;
  std::vector<float> bias;
  if (g.bias != nullptr) {
    bias.resize(static_cast<size_t>(g.n));
    loadRow(bias.data(), g.bias, g.biasDtype, 1, g.n);
  }
  const float* b = bias.empty() ? nullptr : bias.data();
  if (hasFewRows(g)) {
    runFewRows(g, b);
    return;
  }
  // An element's sum knows the parts of k, with oneDNN also the width of its tile, but not which rows are in the tile.
  const MatmulCut cut = cutMatmul(std::max(g.m, g.wholeRows), g.n, g.k);
  if (cut.parts > 1) {
    runParts(g, cut, b);
  } else {
    parallelFor(tileCount(g, cut), [&](int64_t task) { runTile(g, cut, b, task); });
  }
}

void runMatmuls(const std::vector<MatmulArgs>& products) {
  struct Cut {
    const MatmulArgs* product;
    MatmulCut cut;
    int64_t end;  // tasks of the products up to this one
  };
  std::vector<Cut> cuts;
  int64_t tasks = 0;
  for (const MatmulArgs& g : products) {
    if (g.m == 0 || g.n == 0) continue;
    const MatmulCut cut = cutMatmul(g.m, g.n, g.k);
    if (g.bias != nullptr || g.wholeRows > g.m || hasFewRows(g) || cut.parts > 1) {
      runMatmul(g);
      continue;
    }
    tasks += tileCount(g, cut);
    cuts.push_back({&g, cut, tasks});
  }
  parallelFor(tasks, [&](int64_t task) {
    const auto at = std::upper_bound(cuts.begin(), cuts.end(), task,
                                     [](int64_t wanted, const Cut& one) { return wanted < one.end; });
    const int64_t before = at == cuts.begin() ? 0 : (at - 1)->end;
    runTile(*at->product, at->cut, nullptr, task - before);
  });
}

void setMatmulEngine(const std::string& name) {
  if (name == "auto") {
    engine = Engine::Auto;
  } else if (name == "builtin") {
    engine = Engine::Builtin;
  } else {
    VIADUCT_CHECK(name == "onednn", "ERR_UNSUPPORTED", "matmul",
                  "expected engine auto, builtin or onednn, got " + name + ": use one of these");
    VIADUCT_CHECK(onednn::available(DType::F32), "ERR_UNSUPPORTED", "matmul",
                  "expected a build with oneDNN, got one without: install it and build again, or use builtin");
    engine = Engine::OneDnn;
  }
}

std::string matmulEngine(DType dtype) {
  return usesOneDnn(dtype) ? onednn::version() : std::string("builtin ") + simdTarget();
}

void CpuBackend::setMatmulEngine(const std::string& name) { cpu::setMatmulEngine(name); }

MatmulArgs checkedProduct(const TensorRef& y, const TensorRef& a, const TensorRef& b, const TensorRef& bias,
                          bool transA, bool transB) {
  const MatmulShape shape = checkMatmul(y, a, b, bias, transA, transB);
  MatmulArgs g;
  g.m = shape.m;
  g.n = shape.n;
  g.k = shape.k;
  g.bias = bias.data;
  g.biasDtype = bias.dtype;
  g.y = y.data;
  g.yDtype = y.dtype;
  g.ldy = y.stride[0];
  const MatrixView av{a.data, a.dtype, a.stride[0], 1};
  const MatrixView bv{b.data, b.dtype, b.stride[0], 1};
  g.a = transA ? av.transposed() : av;
  g.b = transB ? bv.transposed() : bv;
  return g;
}

void CpuBackend::matmul(Stream& s, InOut y, In a, In b, OptIn bias, bool transA, bool transB, bool accumulate) {
  MatmulArgs g = checkedProduct(y, a, b, bias, transA, transB);
  g.accumulate = accumulate;
  s.enqueue("matmul", [g] { runMatmul(g); });
}

void CpuBackend::matmulRows(Stream& s, Out y, In a, In b, OptIn bias, bool transB, int64_t rows) {
  MatmulArgs g = checkedProduct(y, a, b, bias, false, transB);
  checkMatmulRows(y, rows);
  g.wholeRows = rows;
  s.enqueue("matmulRows", [g] { runMatmul(g); });
}

void CpuBackend::matmulActivation(Stream& s, Out y, OptOut pre, In a, In b, OptIn bias, Activation kind) {
  checkMatmulActivation(y, pre, a, kind);
  const TensorRef& sum = pre.present() ? static_cast<const TensorRef&>(pre) : y;
  matmul(s, as<InOut>(sum), a, b, bias, false, true, false);
  activationForward(s, y, as<In>(sum), kind);
}

}  // namespace viaduct::cpu
