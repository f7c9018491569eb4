// How a copy between tensors of any strides walks memory: dims ordered by where the result lies, runs joined.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tensor.h"

namespace viaduct {

/// Dims ordered from y's largest stride to its smallest; neighbours that both sides walk as one are joined.
struct CopyPlan {
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t y[kMaxDims] = {};
  int64_t x[kMaxDims] = {};
};

inline CopyPlan planCopy(const TensorRef& y, const int64_t* xStride) {
  int order[kMaxDims];
  int n = 0;
  for (int i = 0; i < y.ndim; ++i)
    if (y.shape[i] != 1) order[n++] = i;
  std::stable_sort(order, order + n, [&](int a, int b) { return y.stride[a] > y.stride[b]; });
  CopyPlan plan;
  for (int k = 0; k < n; ++k) {
    const int i = order[k];
    const int last = plan.ndim - 1;
    if (last >= 0 && plan.y[last] == y.stride[i] * y.shape[i] && plan.x[last] == xStride[i] * y.shape[i]) {
      plan.shape[last] *= y.shape[i];
      plan.y[last] = y.stride[i];
      plan.x[last] = xStride[i];
    } else {
      plan.shape[plan.ndim] = y.shape[i];
      plan.y[plan.ndim] = y.stride[i];
      plan.x[plan.ndim] = xStride[i];
      ++plan.ndim;
    }
  }
  if (plan.ndim == 0) {
    plan.ndim = 1;
    plan.shape[0] = 1;
    plan.y[0] = plan.x[0] = 1;
  }
  return plan;
}

/// Offsets of the index-th element of the outer dims [0, n).
inline void outerOffsets(const CopyPlan& plan, int n, int64_t index, int64_t* y, int64_t* x) {
  for (int i = n - 1; i >= 0; --i) {
    const int64_t k = index % plan.shape[i];
    index /= plan.shape[i];
    *y += k * plan.y[i];
    *x += k * plan.x[i];
  }
}

}  // namespace viaduct
