// Arguments of the matrix product.
#include "ops.h"

namespace viaduct {

MatmulShape checkMatmul(const TensorRef& y, const TensorRef& a, const TensorRef& b, const TensorRef& bias, bool transA,
                        bool transB) {
  const auto isFloat = [](DType t) { return t == DType::F32 || t == DType::BF16 || t == DType::F16; };
  VIADUCT_CHECK(
      y.ndim == 2 && a.ndim == 2 && b.ndim == 2, "ERR_SHAPE", "matmul",
      "expected matrices, got y " + describe(y) + ", a " + describe(a) + ", b " + describe(b) + ": view them as 2-D");
  VIADUCT_CHECK(isFloat(a.dtype) && a.dtype == b.dtype && (y.dtype == a.dtype || y.dtype == DType::F32), "ERR_DTYPE",
                "matmul",
                "expected a and b of one float dtype and y of that dtype or float32, got y " + describe(y) + ", a " +
                    describe(a) + ", b " + describe(b) + ": cast first");
  VIADUCT_CHECK(y.rowStrided() && a.rowStrided() && b.rowStrided(), "ERR_LAYOUT", "matmul",
                "expected rows without gaps, got y " + describe(y) + ", a " + describe(a) + ", b " + describe(b) +
                    ": copy, or use transA and transB");
  MatmulShape g;
  g.m = a.shape[transA ? 1 : 0];
  g.k = a.shape[transA ? 0 : 1];
  g.n = b.shape[transB ? 0 : 1];
  VIADUCT_CHECK(b.shape[transB ? 1 : 0] == g.k && y.shape[0] == g.m && y.shape[1] == g.n, "ERR_SHAPE", "matmul",
                "expected y[M,N], op(a)[M,K], op(b)[K,N], got y " + describe(y) + ", a " + describe(a) +
                    (transA ? " transposed" : "") + ", b " + describe(b) + (transB ? " transposed" : "") +
                    ": check the shapes and the flags");
  if (bias.present()) {
    VIADUCT_CHECK(bias.ndim == 1 && bias.shape[0] == g.n && bias.rowStrided(), "ERR_SHAPE", "matmul",
                  "expected bias [" + std::to_string(g.n) + "] without gaps, got " + describe(bias) +
                      ": give one value a column");
    VIADUCT_CHECK(isFloat(bias.dtype), "ERR_DTYPE", "matmul",
                  "expected a float bias, got " + describe(bias) + ": cast it");
  }
  return g;
}

void checkMatmulRows(const TensorRef& y, int64_t rows) {
  const int64_t m = y.ndim == 2 ? y.shape[0] : 0;
  VIADUCT_CHECK(m != 1 && rows >= m && rows >= kLeastSharedRows, "ERR_SHAPE", "matmulRows",
                "expected at least 2 rows of a product of at least " + std::to_string(kLeastSharedRows) + ", got " +
                    std::to_string(m) + " of " + std::to_string(rows) + ": call matmul for all rows");
}

void checkRowCounts(const char* op, const TensorRef& x, size_t matrices, const std::vector<int64_t>& counts) {
  VIADUCT_CHECK(
      matrices == counts.size(), "ERR_SHAPE", op,
      "expected a count for each of " + std::to_string(matrices) + " matrices, got " + std::to_string(counts.size()));
  checkNdim(op, "x", x, 2);
  int64_t total = 0;
  for (int64_t count : counts) {
    VIADUCT_CHECK(count >= 0 && count <= x.dim(0), "ERR_SHAPE", op,
                  "expected counts from 0 to " + std::to_string(x.dim(0)) + ", got " + std::to_string(count));
    total += count;
  }
  VIADUCT_CHECK(total == x.dim(0), "ERR_SHAPE", op,
                "expected counts of " + std::to_string(x.dim(0)) + " rows, got " + std::to_string(total));
}

}  // namespace viaduct
