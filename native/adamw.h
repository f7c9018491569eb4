// The numbers of one AdamW update that its slots give, with the same bits on every device: powers are multiplied out, a product
// that goes into a sum is fused with it, so that no compiler and no library of functions has a say.
#pragma once

#include <cmath>
#include <cstdint>

#include "half.h"

namespace viaduct {

struct AdamwStep {
  float gradFactor;
  float decay;          // 1 - lr * weightDecay
  float lerp;           // 1 - beta1
  float beta2, rest2;   // beta2, 1 - beta2
  float step, stepLow;  // -lr / (1 - beta1^t) * sqrt(1 - beta2^t), as a sum of two
  float eps, epsLow;    // eps * sqrt(1 - beta2^t), as a sum of two
};

/// 1 - beta^t in F64, found back from its rounding to F32: the slot tells t, and t tells the value. The slot's own value
/// where it is not such a rounding.
VIADUCT_HOST_DEVICE inline double adamwCorrection(float slot, double beta) {
  const double steps = std::round(std::log1p(-static_cast<double>(slot)) / std::log(beta));
  if (!(steps >= 0 && steps < 9e15)) return slot;
  double power = 1, square = beta;
  for (auto rest = static_cast<int64_t>(steps); rest > 0; rest /= 2) {
    if (rest % 2 != 0) power = std::fma(power, square, 0.0);  // not fused with the difference below
    square *= square;
  }
  const double exact = 1.0 - power;
  return static_cast<float>(exact) == slot ? exact : slot;
}

/// slots: lr, 1 - beta1^t, 1 - beta2^t, factor of the gradient.
VIADUCT_HOST_DEVICE inline AdamwStep adamwStep(const float* slots, double beta1, double beta2, double eps,
                                               double weightDecay) {
  const double lr = slots[0];
  const double root = std::sqrt(adamwCorrection(slots[2], beta2));
  const double rate = -lr / adamwCorrection(slots[1], beta1);
  AdamwStep s;
  s.gradFactor = slots[3];
  s.decay = static_cast<float>(std::fma(-lr, weightDecay, 1.0));
  s.lerp = static_cast<float>(1.0 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.rest2 = static_cast<float>(1.0 - beta2);
  s.step = static_cast<float>(rate * root);
  s.stepLow = static_cast<float>(std::fma(rate, root, -static_cast<double>(s.step)));
  s.eps = static_cast<float>(eps * root);
  s.epsLow = static_cast<float>(std::fma(eps, root, -static_cast<double>(s.eps)));
  return s;
}

}  // namespace viaduct
