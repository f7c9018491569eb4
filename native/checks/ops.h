// What each op takes, checked on the caller's thread before anything is enqueued; the same for every device. One function an
// op, or a group of ops of one signature; meanings stand in backend.h. Each throws viaduct::Error as arguments.h does.
#pragma once

#include "arguments.h"

namespace viaduct {

// ---- elementwise.cc
void checkCopy(const TensorRef& y, const TensorRef& x);
/// add, mul.
void checkBinary(const char* op, const TensorRef& y, const TensorRef& a, const TensorRef& b);
void checkAccumulate(const TensorRef& acc, const TensorRef& x);
void checkScale(const TensorRef& x, const TensorRef& factor);
void checkSum(const TensorRef& y, const TensorRef& x);
void checkSumRows(const TensorRef& acc, const TensorRef& x);
void checkAddBias(const TensorRef& y, const TensorRef& x, const TensorRef& bias);

// ---- matmul.cc
struct MatmulShape {
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
};
MatmulShape checkMatmul(const TensorRef& y, const TensorRef& a, const TensorRef& b, const TensorRef& bias, bool transA,
                        bool transB);

}  // namespace viaduct
