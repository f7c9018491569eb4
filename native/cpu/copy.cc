// fill and copy: tensors of any strides and dtypes. A copy is planned once (dims ordered by y's memory, runs joined)
// and then walked in tasks cut by shape; cast.cc converts the rows.
#include <algorithm>
#include <cstring>

#include "../checks/ops.h"
#include "../copy_plan.h"
#include "cast.h"
#include "cpu_backend.h"
#include "parallel.h"

namespace viaduct::cpu {

namespace {

constexpr int64_t kTask = 65536;  // elements of one task
constexpr int64_t kTile = 32;     // side of a tile of a transposition: 32 lines of x stay in the first cache

void runRows(const CopyPlan& plan, CastRow row, char* y, int64_t yBytes, const char* x, int64_t xBytes) {
  const int last = plan.ndim - 1;
  const int64_t inner = plan.shape[last];
  int64_t outer = 1;
  for (int i = 0; i < last; ++i) outer *= plan.shape[i];
  if (inner > kTask) {  // long rows are cut
    const int64_t pieces = (inner + kTask - 1) / kTask;
    parallelFor(outer * pieces, [&](int64_t task) {
      int64_t yAt = 0, xAt = 0;
      outerOffsets(plan, last, task / pieces, &yAt, &xAt);
      const int64_t begin = task % pieces * kTask;
      yAt += begin * plan.y[last];
      xAt += begin * plan.x[last];
      row(y + yAt * yBytes, plan.y[last], x + xAt * xBytes, plan.x[last], std::min(kTask, inner - begin));
    });
    return;
  }
  parallelChunks(outer, std::max<int64_t>(1, kTask / inner), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      int64_t yAt = 0, xAt = 0;
      outerOffsets(plan, last, o, &yAt, &xAt);
      row(y + yAt * yBytes, plan.y[last], x + xAt * xBytes, plan.x[last], inner);
    }
  });
}

// x runs along dim `across`, y along the last dim: tiles of both, so that each line of x is read once.
void runTiles(CopyPlan plan, int across, CastRow row, char* y, int64_t yBytes, const char* x, int64_t xBytes) {
  const int last = plan.ndim - 1;
  std::swap(plan.shape[across], plan.shape[last - 1]);
  std::swap(plan.y[across], plan.y[last - 1]);
  std::swap(plan.x[across], plan.x[last - 1]);
  const int64_t rows = plan.shape[last - 1], columns = plan.shape[last];
  const int64_t bands = (rows + kTile - 1) / kTile;
  int64_t outer = 1;
  for (int i = 0; i < last - 1; ++i) outer *= plan.shape[i];
  parallelFor(outer * bands, [&](int64_t task) {
    int64_t yBase = 0, xBase = 0;
    outerOffsets(plan, last - 1, task / bands, &yBase, &xBase);
    const int64_t firstRow = task % bands * kTile, lastRow = std::min(rows, firstRow + kTile);
    for (int64_t c = 0; c < columns; c += kTile) {
      const int64_t n = std::min(kTile, columns - c);
      for (int64_t r = firstRow; r < lastRow; ++r) {
        const int64_t yAt = yBase + r * plan.y[last - 1] + c * plan.y[last];
        const int64_t xAt = xBase + r * plan.x[last - 1] + c * plan.x[last];
        row(y + yAt * yBytes, plan.y[last], x + xAt * xBytes, plan.x[last], n);
      }
    }
  });
}

}  // namespace

void CpuBackend::fill(Stream& s, Out y, double value) {
  if (y.numel() == 0) return;
  const Element element = elementOf(y.dtype, value);
  s.enqueue("fill", [=] {
    const int64_t zeros[kMaxDims] = {};
    const int64_t bytes = static_cast<int64_t>(dtypeBytes(y.dtype));
    const CopyPlan plan = planCopy(y, zeros);
    const bool zero = std::all_of(element.bytes, element.bytes + bytes, [](unsigned char b) { return b == 0; });
    if (zero && plan.ndim == 1 && plan.y[0] == 1) {
      parallelChunks(plan.shape[0] * bytes, kTask * 4,
                     [&](int64_t begin, int64_t end) { std::memset(y.as<char>() + begin, 0, end - begin); });
      return;
    }
    runRows(plan, castRow(y.dtype, y.dtype), y.as<char>(), bytes, reinterpret_cast<const char*>(element.bytes), bytes);
  });
}

void CpuBackend::copy(Stream& s, Out y, In x) {
  checkCopy(y, x);
  const CastRow row = castRow(y.dtype, x.dtype);
  if (y.numel() == 0) return;
  s.enqueue("copy", [=] {
    const int64_t yBytes = static_cast<int64_t>(dtypeBytes(y.dtype)),
                  xBytes = static_cast<int64_t>(dtypeBytes(x.dtype));
    const CopyPlan plan = planCopy(y, x.stride);
    const int last = plan.ndim - 1;
    if (plan.x[last] != 1) {
      for (int i = 0; i < last; ++i)
        if (plan.x[i] == 1) return runTiles(plan, i, row, y.as<char>(), yBytes, x.as<char>(), xBytes);
    }
    runRows(plan, row, y.as<char>(), yBytes, x.as<char>(), xBytes);
  });
}

}  // namespace viaduct::cpu
