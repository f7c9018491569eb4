// The matrix product between its op (matmul.cc) and what computes it: cuBLASLt, or plain loops under emulation.
#pragma once

#include "../checks/ops.h"
#include "../plugin.h"
#include "cuda_backend.h"

namespace viaduct::cuda {

/// What a product ends with. GeluTanh also keeps what the function is of.
enum class Epilogue { None, GeluTanh, Relu };

/// y[M,N] = (accumulate ? y : 0) + op(a) . op(b) (+ bias[N]), then the epilogue; row-major, with leading dimensions in elements.
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
  Epilogue epilogue;
  void* pre;          // or null: receives what the epilogue's function is of, packed, of y's dtype
  int64_t wholeRows;  // more than m: these are rows of a product of so many, and its algorithm computes them
};

/// The arguments of a product of tensors, checked. Throws ERR_SHAPE, ERR_DTYPE, ERR_LAYOUT.
MatmulArgs productArgs(const TensorRef& y, const TensorRef& a, const TensorRef& b, const TensorRef& bias, bool transA,
                       bool transB, bool accumulate, int64_t wholeRows);

/// Where a product starts, and scratch memory that is its own until it ends. From a command.
struct Lane {
  int gpu;
  cudaStream_t stream;
  void* scratch;
  size_t scratchBytes;
};

/// What a library has for products of one form: the ways to compute them, its best guess first. They differ in speed and bits.
class ProductPlan {
 public:
  virtual ~ProductPlan() = default;
  virtual size_t algorithms() const = 0;
  /// Starts the product by one of them. The result goes to `result`, laid out as y and mostly y itself; where the product
  /// accumulates, y is what it is added to. Throws where the algorithm does not take the call.
  virtual void start(size_t algorithm, const MatmulArgs& g, void* result, const Lane& lane) = 0;
};

/// A plan of at most `most` algorithms. Throws ERR_UNSUPPORTED when the library is missing or has none.
std::unique_ptr<ProductPlan> makeProductPlan(const MatmulArgs& g, int gpu, int most);

/// Scratch memory that a product may use, in bytes.
size_t matmulScratch();

/// The library's name and version, or why there is none.
std::string matmulLibrary();
void matmulOptions(const DeviceOptions& options);
/// Folders that are searched for cuBLAS first.
std::vector<std::string> matmulFolders();

// ---- matmul_tuning.cc: plans that are kept, and which of a plan's algorithms computes a product

/// "auto": the library's best guess; "tuned": the fastest of its first eight, timed at the first call of a form.
void setMatmulTuning(const std::string& engine);
/// Whether the fastest is taken.
bool matmulTuned();
/// Bytes of a result beside y that the product may want in order to time algorithms; 0 for nearly all calls.
size_t matmulSpare(const MatmulArgs& g, int gpu);
/// Whether the library has the product, which is one with an epilogue; its plan is kept.
bool matmulTakes(const MatmulArgs& g, int gpu);
/// Starts the product; from a command. Without `spare` an accumulating product is not timed.
void startMatmul(const MatmulArgs& g, const Lane& lane, void* spare);

// ---- matmul_grouped_cublas.cc, under emulation emulation/matmul_host.cc

/// Starts products that differ in rows and matrices alone, all in one launch; from a command. `pointers` is memory of the GPU with
/// the addresses of all b, then of all a, then of all y. False, and nothing started, where the library does not take these
/// dtypes. Throws ERR_UNSUPPORTED when the library is missing.
bool startGrouped(const std::vector<MatmulArgs>& products, void* const* pointers, const Lane& lane);

}  // namespace viaduct::cuda
