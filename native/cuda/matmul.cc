// The op matmul; what computes it is behind matmul.h.
#include "matmul.h"

#include <algorithm>

namespace viaduct::cuda {

namespace {

/// A product over nothing: zeros, or the bias.
void emptySum(CudaBackend& backend, Stream& s, InOut y, OptIn bias, bool accumulate) {
  const Out out = as<Out>(y);
  if (!bias.present()) {
    if (!accumulate) backend.fill(s, out, 0);
    return;
  }
  VIADUCT_CHECK(!accumulate, "ERR_UNSUPPORTED", "matmul", "expected K above 0 for a bias that is added to y");
  In rows = as<In>(y);
  rows.data = bias.data;
  rows.stride[0] = 0;
  rows.stride[1] = bias.stride[0];
  backend.copy(s, out, rows);
}

}  // namespace

void CudaBackend::matmul(Stream& s, InOut y, In a, In b, OptIn bias, bool transA, bool transB, bool accumulate) {
  multiply(s, y, a, b, bias, transA, transB, accumulate, 0);
}

void CudaBackend::matmulRows(Stream& s, Out y, In a, In b, OptIn bias, bool transB, int64_t rows) {
  checkMatmulRows(y, rows);
  multiply(s, as<InOut>(y), a, b, bias, false, transB, false, rows);
}

void CudaBackend::setMatmulEngine(const std::string& engine) { setMatmulTuning(engine); }

void CudaBackend::multiply(Stream& s, InOut y, In a, In b, OptIn bias, bool transA, bool transB, bool accumulate,
                           int64_t wholeRows) {
  const MatmulArgs g = productArgs(y, a, b, bias, transA, transB, accumulate, wholeRows);
  if (g.shape.m == 0 || g.shape.n == 0) return;
  if (g.shape.k == 0) return emptySum(*this, s, y, bias, accumulate);
  start(wholeRows > 0 ? "matmulRows" : "matmul", s, g);
}

void CudaBackend::matmulActivation(Stream& s, Out y, OptOut pre, In a, In b, OptIn bias, Activation kind) {
  checkMatmulActivation(y, pre, a, kind);
  MatmulArgs g = productArgs(y, a, b, bias, false, true, false, 0);
  if (y.numel() == 0) return;
  g.pre = pre.data;
  // cuBLASLt's GELU takes the hardware's approximated tanh, too coarse for F32, and keeps rows of `pre` by eights. Of a relu it
  // keeps which elements were positive, not what it was of.
  if (kind == Activation::GeluTanh && g.dtype != DType::F32 && g.shape.n % 8 == 0) g.epilogue = Epilogue::GeluTanh;
  if (kind == Activation::Relu && !pre.present()) g.epilogue = Epilogue::Relu;
  if (g.epilogue != Epilogue::None && g.shape.k > 0 && matmulTakes(g, device_.ordinal())) {
    return start("matmulActivation", s, g);
  }
  const TensorRef& sum = pre.present() ? static_cast<const TensorRef&>(pre) : y;
  multiply(s, as<InOut>(sum), a, b, bias, false, true, false, 0);
  activationForward(s, y, as<In>(sum), kind);
}

void CudaBackend::start(const char* op, Stream& s, const MatmulArgs& g) {
  CudaStream& stream = cudaStream(s);
  const int gpu = device_.ordinal();
  const size_t bytes = matmulScratch();
  const Scratch scratch(*this, s, bytes);
  const Scratch spare(*this, s, matmulSpare(g, gpu));
  const Lane lane{gpu, stream.get(), scratch.as<void>(), bytes};
  s.enqueue(op, [g, lane, beside = spare.as<void>()] { startMatmul(g, lane, beside); });
}

MatmulArgs productArgs(const TensorRef& y, const TensorRef& a, const TensorRef& b, const TensorRef& bias, bool transA,
                       bool transB, bool accumulate, int64_t wholeRows) {
  MatmulArgs g{};
  g.wholeRows = wholeRows;
  g.shape = checkMatmul(y, a, b, bias, transA, transB);
  VIADUCT_CHECK(!bias.present() || bias.dtype == y.dtype, "ERR_DTYPE", "matmul",
                "expected a bias of y's dtype, got y " + viaduct::describe(y) + " and bias " + viaduct::describe(bias) +
                    ": cast it");
  g.y = y.data;
  g.a = a.data;
  g.b = b.data;
  g.bias = bias.data;
  g.yDtype = y.dtype;
  g.dtype = a.dtype;
  g.biasDtype = bias.dtype;
  const auto leading = [](const TensorRef& x) {
    return x.shape[0] <= 1 ? std::max<int64_t>(x.shape[1], 1) : x.stride[0];
  };
  g.ldy = leading(y);
  g.lda = leading(a);
  g.ldb = leading(b);
  g.transA = transA;
  g.transB = transB;
  g.accumulate = accumulate;
  const auto rowsApart = [](const TensorRef& x) { return x.shape[0] <= 1 || x.stride[0] >= x.shape[1]; };
  VIADUCT_CHECK(rowsApart(y) && rowsApart(a) && rowsApart(b), "ERR_LAYOUT", "matmul",
                "expected rows that do not overlap, got y " + viaduct::describe(y) + ", a " + viaduct::describe(a) +
                    ", b " + viaduct::describe(b) + ": copy into a fresh tensor first");
  return g;
}

namespace {
const Support support{{"matmul", Takes::Float}, {"matmulRows", Takes::Float}, {"matmulActivation", Takes::Float}};
}

}  // namespace viaduct::cuda
