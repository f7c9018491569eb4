// Arguments of embedding ops.
#include "ops.h"

namespace viaduct {

namespace {

void checkTokens(const char* op, const TensorRef& ids) {
  checkIds(op, "ids", ids);
  checkNdim(op, "ids", ids, 1);
  checkContiguous(op, "ids", ids);
}

}  // namespace

void checkEmbeddingForward(const TensorRef& y, const TensorRef& w, const TensorRef& ids) {
  const char* op = "embeddingForward";
  checkFloat(op, "w", w);
  checkNdim(op, "w", w, 2);
  checkRowStrided(op, "w", w);
  checkTokens(op, ids);
  checkSameDtype(op, "y", y, "w", w);
  checkShape(op, "y", y, {ids.dim(0), w.dim(1)});
  checkRowStrided(op, "y", y);
}

void checkEmbeddingBackward(const TensorRef& dw, const TensorRef& dy, const TensorRef& ids) {
  const char* op = "embeddingBackward";
  checkDtype(op, "dw", dw, {DType::F32});
  checkNdim(op, "dw", dw, 2);
  checkRowStrided(op, "dw", dw);
  checkTokens(op, ids);
  checkFloat(op, "dy", dy);
  checkShape(op, "dy", dy, {ids.dim(0), dw.dim(1)});
  checkRowStrided(op, "dy", dy);
}

}  // namespace viaduct
