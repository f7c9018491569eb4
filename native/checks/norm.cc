// What the norms take.
#include "ops.h"

namespace viaduct {

namespace {

void checkInput(const char* op, const TensorRef& x) {
  checkFloat(op, "x", x);
  VIADUCT_CHECK(x.ndim >= 1 && x.dim(-1) > 0, "ERR_SHAPE", op, "expected x [..., H] with H > 0, got " + describe(x));
  checkRowStrided(op, "x", x);
}

void checkLike(const char* op, const char* name, const TensorRef& t, const TensorRef& x) {
  checkSameDtype(op, name, t, "x", x);
  checkSameShape(op, name, t, "x", x);
  checkRowStrided(op, name, t);
}

void checkWeight(const char* op, const char* name, const TensorRef& w, const TensorRef& x) {
  if (x.dtype == DType::F32) checkDtype(op, name, w, {DType::F32});
  checkFloat(op, name, w);
  VIADUCT_CHECK(w.dtype == DType::F32 || w.dtype == x.dtype, "ERR_DTYPE", op,
                std::string("expected ") + name + " of float32 or of x's dtype, got " + describe(w));
  checkShape(op, name, w, {x.dim(-1)});
  checkContiguous(op, name, w);
}

void checkStatistic(const char* op, const char* name, const TensorRef& t, const TensorRef& x) {
  checkDtype(op, name, t, {DType::F32});
  checkNumel(op, name, t, x.numel() / x.dim(-1));
  checkContiguous(op, name, t);
}

void checkWeightGradient(const char* op, const char* name, const TensorRef& dw, const TensorRef& x) {
  checkDtype(op, name, dw, {DType::F32});
  checkShape(op, name, dw, {x.dim(-1)});
  checkContiguous(op, name, dw);
}

}  // namespace

void checkRmsNormForward(const TensorRef& y, const TensorRef& rstd, const TensorRef& sum, const TensorRef& x,
                         const TensorRef& residual, const TensorRef& w) {
  const char* op = "rmsNormForward";
  checkInput(op, x);
  checkLike(op, "y", y, x);
  checkStatistic(op, "rstd", rstd, x);
  checkWeight(op, "w", w, x);
  VIADUCT_CHECK(sum.present() == residual.present(), "ERR_SHAPE", op,
                "expected sum and residual both given or both absent, got only one of them");
  if (residual.present()) {
    checkLike(op, "residual", residual, x);
    checkLike(op, "sum", sum, x);
  }
}

void checkRmsNormBackwardInput(const TensorRef& dx, const TensorRef& dy, const TensorRef& x, const TensorRef& w,
                               const TensorRef& rstd, const TensorRef& dResidual) {
  const char* op = "rmsNormBackwardInput";
  checkInput(op, x);
  checkLike(op, "dx", dx, x);
  checkLike(op, "dy", dy, x);
  checkWeight(op, "w", w, x);
  checkStatistic(op, "rstd", rstd, x);
  if (dResidual.present()) checkLike(op, "dResidual", dResidual, x);
}

void checkRmsNormBackwardWeight(const TensorRef& dw, const TensorRef& dy, const TensorRef& x, const TensorRef& rstd) {
  const char* op = "rmsNormBackwardWeight";
  checkInput(op, x);
  checkLike(op, "dy", dy, x);
  checkWeightGradient(op, "dw", dw, x);
  checkStatistic(op, "rstd", rstd, x);
}

void checkLayerNormForward(const TensorRef& y, const TensorRef& mean, const TensorRef& rstd, const TensorRef& x,
                           const TensorRef& w, const TensorRef& bias) {
  const char* op = "layerNormForward";
  checkInput(op, x);
  checkLike(op, "y", y, x);
  checkStatistic(op, "mean", mean, x);
  checkStatistic(op, "rstd", rstd, x);
  checkWeight(op, "w", w, x);
  if (bias.present()) {
    checkWeight(op, "bias", bias, x);
    checkSameDtype(op, "bias", bias, "w", w);
  }
}

void checkLayerNormBackwardInput(const TensorRef& dx, const TensorRef& dy, const TensorRef& x, const TensorRef& w,
                                 const TensorRef& mean, const TensorRef& rstd) {
  const char* op = "layerNormBackwardInput";
  checkInput(op, x);
  checkLike(op, "dx", dx, x);
  checkLike(op, "dy", dy, x);
  checkWeight(op, "w", w, x);
  checkStatistic(op, "mean", mean, x);
  checkStatistic(op, "rstd", rstd, x);
}

void checkLayerNormBackwardWeight(const TensorRef& dw, const TensorRef& dBias, const TensorRef& dy, const TensorRef& x,
                                  const TensorRef& mean, const TensorRef& rstd) {
  const char* op = "layerNormBackwardWeight";
  checkInput(op, x);
  checkLike(op, "dy", dy, x);
  checkWeightGradient(op, "dw", dw, x);
  if (dBias.present()) checkWeightGradient(op, "dBias", dBias, x);
  checkStatistic(op, "mean", mean, x);
  checkStatistic(op, "rstd", rstd, x);
}

}  // namespace viaduct
