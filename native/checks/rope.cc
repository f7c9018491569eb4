// What the rotary embedding takes.
#include <algorithm>

#include "ops.h"

namespace viaduct {

void checkRope(const TensorRef& x, const TensorRef& cos, const TensorRef& sin, const TensorRef& positions) {
  checkFloat("rope", "x", x);
  VIADUCT_CHECK(x.ndim >= 2, "ERR_SHAPE", "rope", "expected x [T, ..., D], got " + describe(x));
  checkRowStrided("rope", "x", x);
  checkDtype("rope", "cos", cos, {DType::F32});
  checkDtype("rope", "sin", sin, {DType::F32});
  checkNdim("rope", "cos", cos, 2);
  checkSameShape("rope", "sin", sin, "cos", cos);
  checkRowStrided("rope", "cos", cos);
  checkRowStrided("rope", "sin", sin);
  VIADUCT_CHECK(2 * cos.dim(1) <= x.dim(-1) && 2 * cos.dim(1) <= kMaxRotated, "ERR_SHAPE", "rope",
                "expected cos [P, R/2] with R at most " + std::to_string(std::min(x.dim(-1), kMaxRotated)) + ", got " +
                    describe(cos));
  checkIds("rope", "positions", positions);
  checkShape("rope", "positions", positions, {x.dim(0)});
  checkContiguous("rope", "positions", positions);
}

}  // namespace viaduct
