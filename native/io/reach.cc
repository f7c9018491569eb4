// Cutting boxes into pieces and moving them; see reach.h.
#include "reach.h"

#include <algorithm>
#include <memory>

#include "../copy_plan.h"

namespace viaduct::io {

namespace {

constexpr int64_t kPieceBytes = int64_t{16} << 20;  // large enough for the full speed of a transfer

/// Rows of one piece between the device and packed host memory, two dims a call.
void moveRows(Backend& backend, const TensorRef& device, const TensorRef& host, bool toHost) {
  const CopyPlan plan = planCopy(device, host.stride);
  const auto bytes = static_cast<int64_t>(dtypeBytes(device.dtype));
  const int last = plan.ndim - 1;
  const bool runs = plan.y[last] == 1 && plan.x[last] == 1;
  const int rowDim = runs ? last - 1 : last;  // dims behind it are one run; it counts the rows of a call
  const int64_t width = (runs ? plan.shape[last] : 1) * bytes;
  const int64_t rows = rowDim >= 0 ? plan.shape[rowDim] : 1;
  const int64_t devicePitch = rowDim >= 0 ? plan.y[rowDim] * bytes : width;
  const int64_t hostPitch = rowDim >= 0 ? plan.x[rowDim] * bytes : width;
  int64_t outer = 1;
  for (int i = 0; i < rowDim; ++i) outer *= plan.shape[i];
  for (int64_t o = 0; o < outer; ++o) {
    int64_t deviceAt = 0, hostAt = 0;
    outerOffsets(plan, std::max(rowDim, 0), o, &deviceAt, &hostAt);
    char* d = device.as<char>() + deviceAt * bytes;
    char* h = host.as<char>() + hostAt * bytes;
    const auto size = [](int64_t n) { return static_cast<size_t>(n); };
    if (toHost) {
      backend.copyRows(h, size(hostPitch), d, size(devicePitch), size(width), size(rows), true);
    } else {
      backend.copyRows(d, size(devicePitch), h, size(hostPitch), size(width), size(rows), false);
    }
  }
}

void pieces(Backend& backend, const TensorRef& box, const OnPiece& work, bool toHost) {
  Dims start;
  start.n = box.ndim;
  if (backend.onHost()) return work(box, start);
  const auto width = static_cast<int64_t>(dtypeBytes(box.dtype));
  const int64_t most = kPieceBytes / width;
  int64_t inner = box.numel();
  if (inner == 0) return;
  int cut = -1;  // dims before it are walked one by one, it in steps
  while (cut + 1 < box.ndim && (cut < 0 || inner > most)) inner /= box.shape[++cut];
  const int64_t step = cut < 0 ? 1 : std::max<int64_t>(1, most / inner);
  TensorRef piece = box;
  for (int d = 0; d < cut; ++d) piece.shape[d] = 1;
  const std::unique_ptr<char[]> memory(new char[static_cast<size_t>(std::min(most, inner * step) * width)]);
  for (;;) {
    int64_t offset = 0;
    if (cut >= 0) piece.shape[cut] = std::min(step, box.shape[cut] - start.v[cut]);
    for (int d = 0; d < box.ndim; ++d) offset += start.v[d] * box.stride[d];
    piece.data = box.as<char>() + offset * width;
    TensorRef host = piece;
    host.data = memory.get();
    int64_t stride = 1;
    for (int d = box.ndim - 1; d >= 0; --d) {
      host.stride[d] = stride;
      stride *= host.shape[d];
    }
    if (toHost) moveRows(backend, piece, host, true);
    work(host, start);
    if (!toHost) moveRows(backend, piece, host, false);
    int d = cut;
    for (; d >= 0; --d) {
      start.v[d] += piece.shape[d];
      if (start.v[d] < box.shape[d]) break;
      start.v[d] = 0;
    }
    if (d < 0) return;
  }
}

}  // namespace

void intoBox(Backend& backend, const TensorRef& box, const OnPiece& fill) { pieces(backend, box, fill, false); }
void fromBox(Backend& backend, const TensorRef& box, const OnPiece& use) { pieces(backend, box, use, true); }

Dims shifted(const Dims& a, const Dims& b) {
  Dims sum = a;
  for (int d = 0; d < a.n; ++d) sum.v[d] += b.v[d];
  return sum;
}

}  // namespace viaduct::io
