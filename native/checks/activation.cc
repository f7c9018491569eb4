// What activations take.
#include "ops.h"

namespace viaduct {

namespace {

void checkKind(const char* op, Activation kind) {
  VIADUCT_CHECK(static_cast<int>(kind) <= static_cast<int>(Activation::Sigmoid), "ERR_UNSUPPORTED", op,
                "expected an activation of 0 to 6, got " + std::to_string(static_cast<int>(kind)));
}

// Everything but the shapes.
void checkOperand(const char* op, const char* name, const TensorRef& t, const TensorRef& x) {
  checkFloat(op, name, t);
  checkSameDtype(op, name, t, "x", x);
  checkContiguous(op, name, t);
}

void checkGated(const char* op, const char* name, const TensorRef& narrow, const TensorRef& x) {
  VIADUCT_CHECK(x.ndim == 2 && x.dim(1) % 2 == 0, "ERR_SHAPE", op,
                "expected x [T, 2F], gate first, then up, got " + describe(x));
  checkShape(op, name, narrow, {x.dim(0), x.dim(1) / 2});
}

}  // namespace

void checkGatedActivationForward(const TensorRef& y, const TensorRef& x, Activation kind) {
  const char* op = "gatedActivationForward";
  checkKind(op, kind);
  checkOperand(op, "x", x, x);
  checkOperand(op, "y", y, x);
  checkGated(op, "y", y, x);
}

void checkGatedActivationBackward(const TensorRef& dx, const TensorRef& dy, const TensorRef& x, Activation kind) {
  const char* op = "gatedActivationBackward";
  checkKind(op, kind);
  checkOperand(op, "x", x, x);
  checkOperand(op, "dx", dx, x);
  checkOperand(op, "dy", dy, x);
  checkGated(op, "dy", dy, x);
  checkSameShape(op, "dx", dx, "x", x);
}

void checkActivationForward(const TensorRef& y, const TensorRef& x, Activation kind) {
  const char* op = "activationForward";
  checkKind(op, kind);
  checkOperand(op, "x", x, x);
  checkOperand(op, "y", y, x);
  checkSameShape(op, "y", y, "x", x);
}

void checkMatmulActivation(const TensorRef& y, const TensorRef& pre, const TensorRef& a, Activation kind) {
  const char* op = "matmulActivation";
  checkKind(op, kind);
  checkOperand(op, "y", y, a);
  if (!pre.present()) return;
  checkOperand(op, "pre", pre, a);
  checkSameShape(op, "pre", pre, "y", y);
}

void checkActivationBackward(const TensorRef& dx, const TensorRef& dy, const TensorRef& x, Activation kind) {
  const char* op = "activationBackward";
  checkKind(op, kind);
  checkOperand(op, "x", x, x);
  checkOperand(op, "dx", dx, x);
  checkOperand(op, "dy", dy, x);
  checkSameShape(op, "dx", dx, "x", x);
  checkSameShape(op, "dy", dy, "x", x);
}

}  // namespace viaduct
