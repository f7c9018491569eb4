// Matmul on raw strided memory: the cut into tiles and the choice of the engine. What the op and the tests call; no streams.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "matmul_kernel.h"

namespace viaduct::cpu {

/// y[m, n] = (accumulate ? y : 0) + a[m, k] b[k, n] (+ bias[n]). y has rows of stride ldy, F32, BF16 or F16.
struct MatmulArgs {
  void* y = nullptr;
  DType yDtype = DType::F32;
  int64_t ldy = 0;
  MatrixView a;
  MatrixView b;
  const void* bias = nullptr;  // null, or n contiguous elements
  DType biasDtype = DType::F32;
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  bool accumulate = false;
  bool rowsVary = false;  // from call to call: oneDNN would make a plan each time, so pairs have kernels of ours
  int64_t wholeRows = 0;  // more than m: these are rows of a product of so many, and get the bits that they have there
};

/// Runs on the calling thread and its team. Bit-equal for every number of threads.
void runMatmul(const MatmulArgs& args);
/// Products that write nothing of one another, with the bits of each alone: tiles of all of them are shared out together.
void runMatmuls(const std::vector<MatmulArgs>& products);
/// Checks the product of an op and gives it as the kernels take it.
MatmulArgs checkedProduct(const TensorRef& y, const TensorRef& a, const TensorRef& b, const TensorRef& bias,
                          bool transA, bool transB);

/// "auto" (default), "builtin" or "onednn". Throws ERR_UNSUPPORTED when this build lacks it. Process-wide.
void setMatmulEngine(const std::string& engine);
/// What runs a tile of this dtype now, e.g. "builtin AVX2" or "oneDNN 2.6.3".
std::string matmulEngine(DType dtype);

/// How [m, n] x k is cut, by shape alone: tiles of mt x nt, k in `parts` equal parts that are summed in order.
struct MatmulCut {
  int64_t mt = 0;
  int64_t nt = 0;
  int64_t parts = 1;
};
MatmulCut cutMatmul(int64_t m, int64_t n, int64_t k);

namespace onednn {
/// False when the build or the CPU has no oneDNN matmul for this dtype.
bool available(DType dtype);
/// "oneDNN 2.6.3"
std::string version();
/// multiplyTile without bias, on the calling thread alone.
void multiplyTile(float* c, int64_t ldc, const MatrixView& a, const MatrixView& b, int64_t m, int64_t n, int64_t k,
                  bool add);
}  // namespace onednn

}  // namespace viaduct::cpu
