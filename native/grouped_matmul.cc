// Products of runs of rows, one matrix each: a mixture's experts. On every device a product each, enqueued from here.
#include "backend.h"
#include "checks/ops.h"

namespace viaduct {

namespace {

template <typename Role>
Role rowsOf(const TensorRef& x, int64_t first, int64_t count) {
  Role part;
  static_cast<TensorRef&>(part) = x;
  part.data = x.as<char>() + first * x.stride[0] * static_cast<int64_t>(dtypeBytes(x.dtype));
  part.shape[0] = count;
  return part;
}

}  // namespace

void Backend::groupedMatmul(Stream& s, Out y, In a, const std::vector<In>& b, const std::vector<int64_t>& counts,
                            bool transB) {
  checkRowCounts("groupedMatmul", a, b.size(), counts);
  checkShape("groupedMatmul", "y", y, {a.dim(0), y.dim(-1)});
  int64_t first = 0;
  for (size_t e = 0; e < counts.size(); first += counts[e++]) {
    if (counts[e] == 0) continue;
    matmul(s, rowsOf<InOut>(y, first, counts[e]), rowsOf<In>(a, first, counts[e]), b[e], OptIn(), false, transB, false);
  }
}

void Backend::groupedMatmulWeights(Stream& s, const std::vector<InOut>& acc, In dy, In x,
                                   const std::vector<int64_t>& counts) {
  checkRowCounts("groupedMatmulWeights", x, acc.size(), counts);
  checkShape("groupedMatmulWeights", "dy", dy, {x.dim(0), dy.dim(-1)});
  int64_t first = 0;
  for (size_t e = 0; e < counts.size(); first += counts[e++]) {
    if (counts[e] == 0) continue;
    matmul(s, acc[e], rowsOf<In>(dy, first, counts[e]), rowsOf<In>(x, first, counts[e]), OptIn(), true, false, true);
  }
}

}  // namespace viaduct
