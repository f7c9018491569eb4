// Products of runs of rows, one matrix each: a mixture's experts. Threads share out the tiles of all experts.
#include "../checks/ops.h"
#include "cpu_backend.h"
#include "matmul.h"

namespace viaduct::cpu {

void CpuBackend::groupedMatmul(Stream& s, Out y, In a, const std::vector<In>& b, const std::vector<int64_t>& counts,
                               bool transB) {
  checkRowCounts("groupedMatmul", a, b.size(), counts);
  checkShape("groupedMatmul", "y", y, {a.dim(0), y.dim(-1)});
  std::vector<MatmulArgs> products;
  int64_t first = 0;
  for (size_t e = 0; e < counts.size(); first += counts[e++]) {
    if (counts[e] == 0) continue;
    products.push_back(checkedProduct(rowsOf<InOut>(y, first, counts[e]), rowsOf<In>(a, first, counts[e]), b[e],
                                      OptIn(), false, transB));
    products.back().rowsVary = true;
  }
  s.enqueue("groupedMatmul", [products = std::move(products)] { runMatmuls(products); });
}

void CpuBackend::groupedMatmulWeights(Stream& s, const std::vector<InOut>& acc, In dy, In x,
                                      const std::vector<int64_t>& counts) {
  checkRowCounts("groupedMatmulWeights", x, acc.size(), counts);
  checkShape("groupedMatmulWeights", "dy", dy, {x.dim(0), dy.dim(-1)});
  std::vector<MatmulArgs> products;
  int64_t first = 0;
  for (size_t e = 0; e < counts.size(); first += counts[e++]) {
    if (counts[e] == 0) continue;
    products.push_back(checkedProduct(acc[e], rowsOf<In>(dy, first, counts[e]), rowsOf<In>(x, first, counts[e]),
                                      OptIn(), true, false));
    products.back().accumulate = products.back().rowsVary = true;
  }
  s.enqueue("groupedMatmulWeights", [products = std::move(products)] { runMatmuls(products); });
}

}  // namespace viaduct::cpu
