// Arguments of copies, elementwise ops and plain sums.
#include "../convert.h"
#include "ops.h"

namespace viaduct {

void checkCopy(const TensorRef& y, const TensorRef& x) {
  checkSameShape("copy", "y", y, "x", x);
  VIADUCT_CHECK(convertible(y.dtype, x.dtype), "ERR_DTYPE", "copy",
                std::string("expected y and x both of floats or both of integers, got ") + dtypeName(y.dtype) +
                    " from " + dtypeName(x.dtype) + ": no such cast");
}

void checkBinary(const char* op, const TensorRef& y, const TensorRef& a, const TensorRef& b) {
  checkFloat(op, "a", a);
  checkSameDtype(op, "b", b, "a", a);
  checkSameDtype(op, "y", y, "a", a);
  checkSameShape(op, "b", b, "a", a);
  checkSameShape(op, "y", y, "a", a);
  checkContiguous(op, "a", a);
  checkContiguous(op, "b", b);
  checkContiguous(op, "y", y);
}

void checkUnary(const char* op, const TensorRef& y, const TensorRef& x) { checkBinary(op, y, x, x); }

void checkAccumulate(const TensorRef& acc, const TensorRef& x) {
  checkDtype("accumulate", "acc", acc, {DType::F32});
  checkFloat("accumulate", "x", x);
  checkSameShape("accumulate", "acc", acc, "x", x);
  checkContiguous("accumulate", "acc", acc);
  checkContiguous("accumulate", "x", x);
}

void checkScale(const TensorRef& x, const TensorRef& factor) {
  checkFloat("scale", "x", x);
  checkDtype("scale", "factor", factor, {DType::F32});
  checkNumel("scale", "factor", factor, 1);
  checkContiguous("scale", "x", x);
}

void checkSum(const TensorRef& y, const TensorRef& x) {
  checkFloat("sum", "x", x);
  checkDtype("sum", "y", y, {DType::F32});
  checkNumel("sum", "y", y, 1);
  checkContiguous("sum", "x", x);
}

void checkSumRows(const TensorRef& acc, const TensorRef& x) {
  checkFloat("sumRows", "x", x);
  checkNdim("sumRows", "x", x, 2);
  checkDtype("sumRows", "acc", acc, {DType::F32});
  checkShape("sumRows", "acc", acc, {x.dim(1)});
  checkRowStrided("sumRows", "x", x);
  checkContiguous("sumRows", "acc", acc);
}

void checkAddBias(const TensorRef& y, const TensorRef& x, const TensorRef& bias) {
  checkFloat("addBias", "x", x);
  VIADUCT_CHECK(x.ndim >= 1, "ERR_SHAPE", "addBias", "expected x with at least 1 dim, got " + describe(x));
  checkSameDtype("addBias", "y", y, "x", x);
  checkSameDtype("addBias", "bias", bias, "x", x);
  checkSameShape("addBias", "y", y, "x", x);
  checkShape("addBias", "bias", bias, {x.dim(-1)});
  checkContiguous("addBias", "x", x);
  checkContiguous("addBias", "y", y);
  checkContiguous("addBias", "bias", bias);
}

}  // namespace viaduct
