// Arguments of the optimizer's ops.
#include "ops.h"

namespace viaduct {

void checkSumSquares(const TensorRef& acc, const TensorRef& x) {
  checkDtype("sumSquares", "acc", acc, {DType::F64});
  checkNumel("sumSquares", "acc", acc, 1);
  checkFloat("sumSquares", "x", x);
  checkContiguous("sumSquares", "x", x);
}

void checkClipFactor(const TensorRef& norm, const TensorRef& factor, const TensorRef& acc) {
  checkDtype("clipFactor", "norm", norm, {DType::F32});
  checkDtype("clipFactor", "factor", factor, {DType::F32});
  checkDtype("clipFactor", "acc", acc, {DType::F64});
  checkNumel("clipFactor", "norm", norm, 1);
  checkNumel("clipFactor", "factor", factor, 1);
  checkNumel("clipFactor", "acc", acc, 1);
}

void checkAdamw(const TensorRef& param, const TensorRef& m, const TensorRef& v, const TensorRef& model,
                const TensorRef& grad, const TensorRef& slots) {
  const char* op = "adamw";
  struct Named {
    const char* name;
    const TensorRef& tensor;
  };
  for (const Named& t : {Named{"param", param}, Named{"m", m}, Named{"v", v}, Named{"grad", grad}}) {
    checkDtype(op, t.name, t.tensor, {DType::F32});
    checkNumel(op, t.name, t.tensor, param.numel());
    checkContiguous(op, t.name, t.tensor);
  }
  if (model.present()) {
    checkDtype(op, "model", model, {DType::BF16, DType::F16});
    checkNumel(op, "model", model, param.numel());
    checkContiguous(op, "model", model);
  }
  checkDtype(op, "slots", slots, {DType::F32});
  checkShape(op, "slots", slots, {4});
  checkContiguous(op, "slots", slots);
}

}  // namespace viaduct
