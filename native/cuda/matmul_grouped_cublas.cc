// Products of matrices of one dtype in one launch, by cuBLAS's grouped product, opened at run time. Sums are F32; products of
// float32 are not rounded to TF32. Not emulated: see emulation/matmul_host.cc.
#include <cublas_v2.h>

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "libraries.h"
#include "matmul.h"

namespace viaduct::cuda {

namespace {

void checkCublas(cublasStatus_t status, const char* what) {
  VIADUCT_CHECK(
      status == CUBLAS_STATUS_SUCCESS, "ERR_NATIVE", "groupedMatmul",
      std::string("expected ") + what + " to succeed, got cuBLAS status " + std::to_string(static_cast<int>(status)));
}

/// The library's functions.
struct Cublas {
  DynamicLibrary library{"cuBLAS", kCublasFile};
  decltype(&cublasCreate_v2) create = nullptr;
  decltype(&cublasSetStream_v2) setStream = nullptr;
  decltype(&cublasSetWorkspace_v2) setWorkspace = nullptr;
  decltype(&cublasGemmGroupedBatchedEx_64) grouped = nullptr;

  explicit Cublas(const std::vector<std::string>& folders) {
    library.open(folders);
    library.find("cublasCreate_v2", &create);
    library.find("cublasSetStream_v2", &setStream);
    library.find("cublasSetWorkspace_v2", &setWorkspace);
    library.find("cublasGemmGroupedBatchedEx_64", &grouped);
  }
};

struct State {
  std::mutex mutex;
  std::unique_ptr<Cublas> cublas;
  std::map<int, cublasHandle_t> handles;  // by GPU
};

/// Of the process; never destroyed, because streams may run while it exits.
State& state() {
  static auto* s = new State();
  return *s;
}

cudaDataType_t typeOf(DType dtype) {
  if (dtype == DType::F32) return CUDA_R_32F;
  return dtype == DType::BF16 ? CUDA_R_16BF : CUDA_R_16F;
}

}  // namespace

// As in matmul_cublaslt.cc the transposed result is computed, with b's memory as the first factor and a's as the second.
bool startGrouped(const std::vector<MatmulArgs>& products, void* const* pointers, const Lane& lane) {
  const MatmulArgs& any = products[0];
  if (any.yDtype != any.dtype) return false;
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (s.cublas == nullptr) s.cublas = std::make_unique<Cublas>(matmulFolders());
  const Cublas& cublas = *s.cublas;
  cublasHandle_t& handle = s.handles[lane.gpu];
  if (handle == nullptr) checkCublas(cublas.create(&handle), "cublasCreate");
  checkCublas(cublas.setStream(handle, lane.stream), "cublasSetStream");
  checkCublas(cublas.setWorkspace(handle, lane.scratch, lane.scratchBytes), "cublasSetWorkspace");

  const size_t count = products.size();
  const std::vector<cublasOperation_t> transB(count, any.transB ? CUBLAS_OP_T : CUBLAS_OP_N);
  const std::vector<cublasOperation_t> transA(count, any.transA ? CUBLAS_OP_T : CUBLAS_OP_N);
  const std::vector<float> one(count, 1);
  const std::vector<float> old(count, any.accumulate ? 1 : 0);
  const std::vector<int64_t> single(count, 1);
  std::vector<int64_t> m, n, k, lda, ldb, ldy;
  for (const MatmulArgs& g : products) {
    m.push_back(g.shape.m);
    n.push_back(g.shape.n);
    k.push_back(g.shape.k);
    lda.push_back(g.lda);
    ldb.push_back(g.ldb);
    ldy.push_back(g.ldy);
  }
  const cublasStatus_t status = cublas.grouped(
      handle, transB.data(), transA.data(), n.data(), m.data(), k.data(), one.data(), pointers, typeOf(any.dtype),
      ldb.data(), pointers + count, typeOf(any.dtype), lda.data(), old.data(), pointers + 2 * count, typeOf(any.yDtype),
      ldy.data(), static_cast<int64_t>(count), single.data(), CUBLAS_COMPUTE_32F);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED) return false;
  checkCublas(status, "cublasGemmGroupedBatchedEx");
  return true;
}

}  // namespace viaduct::cuda
