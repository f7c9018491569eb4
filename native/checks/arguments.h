// Checks of op arguments, made on the caller's thread before anything is enqueued. Each throws viaduct::Error with the
// op's name, what was expected and what came.
#pragma once

#include <initializer_list>
#include <string>

#include "../errors.h"
#include "../tensor.h"

namespace viaduct {

inline std::string shapeText(const int64_t* shape, int ndim) {
  std::string text = "[";
  for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

inline void checkDtype(const char* op, const char* name, const TensorRef& x, std::initializer_list<DType> allowed) {
  std::string text;
  for (DType dtype : allowed) {
    if (x.dtype == dtype) return;
    text += (text.empty() ? "" : " or ") + std::string(dtypeName(dtype));
  }
  throw Error("ERR_DTYPE", op,
              "expected " + std::string(name) + " of " + text + ", got " + describe(x) + ": cast it first");
}

/// What the ops of a model compute in: F32 or BF16, and F16 where the library that is built here has kernels of it.
inline void checkFloat(const char* op, const char* name, const TensorRef& x) {
#ifdef VIADUCT_FLOAT16_OPS
  checkDtype(op, name, x, {DType::F32, DType::BF16, DType::F16});
#else
  checkDtype(op, name, x, {DType::F32, DType::BF16});
#endif
}

inline void checkIds(const char* op, const char* name, const TensorRef& x) {
  checkDtype(op, name, x, {DType::I32, DType::I64});
}

inline void checkSameDtype(const char* op, const char* nameA, const TensorRef& a, const char* nameB,
                           const TensorRef& b) {
  VIADUCT_CHECK(a.dtype == b.dtype, "ERR_DTYPE", op,
                std::string("expected ") + nameA + " and " + nameB + " of one dtype, got " + describe(a) + " and " +
                    describe(b) + ": cast one of them");
}

inline bool sameShape(const TensorRef& a, const TensorRef& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.shape[i] != b.shape[i]) return false;
  return true;
}

inline void checkSameShape(const char* op, const char* nameA, const TensorRef& a, const char* nameB,
                           const TensorRef& b) {
  VIADUCT_CHECK(sameShape(a, b), "ERR_SHAPE", op,
                std::string("expected ") + nameA + " of " + nameB + "'s shape " + shapeText(b.shape, b.ndim) +
                    ", got " + describe(a));
}

inline void checkShape(const char* op, const char* name, const TensorRef& x, std::initializer_list<int64_t> shape) {
  bool ok = x.ndim == static_cast<int>(shape.size());
  int i = 0;
  for (int64_t n : shape) ok = ok && x.shape[i++] == n;
  VIADUCT_CHECK(ok, "ERR_SHAPE", op,
                std::string("expected ") + name + " of shape " +
                    shapeText(shape.begin(), static_cast<int>(shape.size())) + ", got " + describe(x));
}

inline void checkNumel(const char* op, const char* name, const TensorRef& x, int64_t n) {
  VIADUCT_CHECK(x.present() && x.numel() == n, "ERR_SHAPE", op,
                std::string("expected ") + name + " of " + std::to_string(n) + " elements, got " + describe(x));
}

inline void checkNdim(const char* op, const char* name, const TensorRef& x, int ndim) {
  VIADUCT_CHECK(x.ndim == ndim, "ERR_SHAPE", op,
                std::string("expected ") + name + " with " + std::to_string(ndim) + " dims, got " + describe(x));
}

inline void checkContiguous(const char* op, const char* name, const TensorRef& x) {
  VIADUCT_CHECK(
      x.contiguous(), "ERR_LAYOUT", op,
      std::string("expected ") + name + " contiguous, got " + describe(x) + ": copy it into a fresh tensor first");
}

inline void checkRowStrided(const char* op, const char* name, const TensorRef& x) {
  VIADUCT_CHECK(x.rowStrided(), "ERR_LAYOUT", op,
                std::string("expected ") + name + " with an innermost stride of 1, got " + describe(x) +
                    ": copy it into a fresh tensor first");
}

}  // namespace viaduct
