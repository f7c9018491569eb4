// The matrix product between its op (matmul.cc) and what computes it: cuBLASLt, or plain loops under emulation.
#pragma once

#include "../checks/ops.h"
#include "../plugin.h"
#include "cuda_backend.h"

namespace viaduct::cuda {

/// y[M,N] = (accumulate ? y : 0) + op(a) . op(b) (+ bias[N]), row-major, with leading dimensions in elements.
struct MatmulArgs {
  MatmulShape shape;
  void* y;
  const void* a;
  const void* b;
  const void* bias;  // or null
  DType yDtype;
  DType dtype;  // of a and b
  DType biasDtype;
  int64_t ldy;
  int64_t lda;
  int64_t ldb;
  bool transA;
  bool transB;
  bool accumulate;
  int64_t wholeRows;  // more than m: these are rows of a product of so many, and its algorithm computes them
};

/// Scratch memory that a product may use, in bytes.
size_t matmulScratch(const MatmulArgs& g, const Device& device);

/// Starts the product on the stream; from a command. Throws ERR_UNSUPPORTED when the library is missing.
void startMatmul(const MatmulArgs& g, CudaStream& stream, void* scratch, size_t scratchBytes);

/// The library's name and version, or why there is none.
std::string matmulLibrary();
void matmulOptions(const DeviceOptions& options);

}  // namespace viaduct::cuda
