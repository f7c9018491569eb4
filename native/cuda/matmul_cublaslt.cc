// The matrix product by cuBLASLt, opened at run time: the descriptors of a form of products and the algorithms that the library's
// heuristic names for it. Which one computes, and keeping plans, is matmul_tuning.cc's. Sums are F32; products of float32 are
// not rounded to TF32. What libraries of tensor cores do is not emulated: see emulation/matmul_host.cc.
#include <cublasLt.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "libraries.h"
#include "matmul.h"

namespace viaduct::cuda {

namespace {

constexpr size_t kWorkspace = size_t{32} << 20;  // what cuBLAS wants on Hopper

void checkLt(cublasStatus_t status, const char* what) {
  VIADUCT_CHECK(
      status == CUBLAS_STATUS_SUCCESS, "ERR_NATIVE", "matmul",
      std::string("expected ") + what + " to succeed, got cuBLAS status " + std::to_string(static_cast<int>(status)));
}

/// The library's functions.
struct Lt {
  DynamicLibrary library{"cuBLASLt", kCublasLtFile};
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic = nullptr;
  decltype(&cublasLtMatmulDescCreate) descCreate = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) descSet = nullptr;
  decltype(&cublasLtMatmulDescDestroy) descDestroy = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) layoutCreate = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) layoutDestroy = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) preferenceCreate = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preferenceSet = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) preferenceDestroy = nullptr;
  decltype(&cublasLtGetVersion) version = nullptr;

  explicit Lt(const std::vector<std::string>& folders) {
    library.open(folders);
    library.find("cublasLtCreate", &create);
    library.find("cublasLtMatmul", &matmul);
    library.find("cublasLtMatmulAlgoGetHeuristic", &heuristic);
    library.find("cublasLtMatmulDescCreate", &descCreate);
    library.find("cublasLtMatmulDescSetAttribute", &descSet);
    library.find("cublasLtMatmulDescDestroy", &descDestroy);
    library.find("cublasLtMatrixLayoutCreate", &layoutCreate);
    library.find("cublasLtMatrixLayoutDestroy", &layoutDestroy);
    library.find("cublasLtMatmulPreferenceCreate", &preferenceCreate);
    library.find("cublasLtMatmulPreferenceSetAttribute", &preferenceSet);
    library.find("cublasLtMatmulPreferenceDestroy", &preferenceDestroy);
    library.find("cublasLtGetVersion", &version);
  }
};

struct State {
  std::mutex mutex;
  std::vector<std::string> folders;
  std::unique_ptr<Lt> lt;
  std::map<int, cublasLtHandle_t> handles;  // by GPU
};

/// Of the process; never destroyed, because streams may run while it exits.
State& state() {
  static auto* s = new State();
  return *s;
}

Lt& library(State& s) {
  if (s.lt == nullptr) s.lt = std::make_unique<Lt>(s.folders);
  return *s.lt;
}

cudaDataType_t typeOf(DType dtype) {
  if (dtype == DType::F32) return CUDA_R_32F;
  return dtype == DType::BF16 ? CUDA_R_16BF : CUDA_R_16F;
}

uint32_t alignmentOf(const void* data) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  uint32_t alignment = 256;
  while (address % alignment != 0) alignment /= 2;
  return alignment;
}

cublasLtEpilogue_t epilogueOf(const MatmulArgs& g) {
  const bool bias = g.bias != nullptr;
  switch (g.epilogue) {
    case Epilogue::None:
      return bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    case Epilogue::Relu:
      return bias ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_RELU;
    case Epilogue::GeluTanh:
      if (g.pre == nullptr) return bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
      return bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
  }
  return CUBLASLT_EPILOGUE_DEFAULT;
}

class LtPlan final : public ProductPlan {
 public:
  LtPlan(const Lt& lt, cublasLtHandle_t handle, const MatmulArgs& g, int most) : lt_(lt), handle_(handle) {
    try {
      make(g, most);
    } catch (...) {
      destroy();
      throw;
    }
  }
  ~LtPlan() override { destroy(); }

  size_t algorithms() const override { return found_.size(); }

  void start(size_t algorithm, const MatmulArgs& g, void* out, const Lane& lane) override {
    const cublasLtMatmulHeuristicResult_t& chosen = found_.at(algorithm);
    if (g.bias != nullptr) {
      checkLt(lt_.descSet(product_, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &g.bias, sizeof g.bias), "an attribute");
    }
    if (g.pre != nullptr) {
      checkLt(lt_.descSet(product_, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &g.pre, sizeof g.pre), "an attribute");
    }
    const float one = 1;
    const float old = g.accumulate ? 1 : 0;
    checkLt(
        lt_.matmul(handle_, product_, &one, g.b, first_, g.a, second_, &old, g.accumulate ? g.y : out, result_, out,
                   result_, &chosen.algo, lane.scratch, std::min(chosen.workspaceSize, lane.scratchBytes), lane.stream),
        "cublasLtMatmul");
  }

 private:
  void make(const MatmulArgs& g, int most);
  void destroy() {
    for (cublasLtMatrixLayout_t layout : {first_, second_, result_}) {
      if (layout != nullptr) lt_.layoutDestroy(layout);
    }
    if (product_ != nullptr) lt_.descDestroy(product_);
  }

  const Lt& lt_;
  const cublasLtHandle_t handle_;
  cublasLtMatmulDesc_t product_ = nullptr;
  cublasLtMatrixLayout_t first_ = nullptr, second_ = nullptr, result_ = nullptr;
  std::vector<cublasLtMatmulHeuristicResult_t> found_;
};

// cuBLAS sees columns where a row-major tensor has rows. So the transposed result is computed: y^T = op(b)^T . op(a)^T, with
// b's memory as the first factor and a's as the second.
void LtPlan::make(const MatmulArgs& g, int most) {
  const Lt& lt = lt_;
  const auto [m, n, k] = g.shape;
  const auto u = [](int64_t x) { return static_cast<uint64_t>(x); };
  checkLt(lt.descCreate(&product_, CUBLAS_COMPUTE_32F, CUDA_R_32F), "a descriptor");
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
    checkLt(lt.descSet(product_, attribute, &value, sizeof value), "an attribute");
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, static_cast<int32_t>(g.transB ? CUBLAS_OP_T : CUBLAS_OP_N));
  set(CUBLASLT_MATMUL_DESC_TRANSB, static_cast<int32_t>(g.transA ? CUBLAS_OP_T : CUBLAS_OP_N));
  set(CUBLASLT_MATMUL_DESC_EPILOGUE, static_cast<int32_t>(epilogueOf(g)));
  if (g.pre != nullptr) {
    set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, g.pre);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t{n});
  }
  if (g.bias != nullptr) {
    set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, static_cast<int32_t>(typeOf(g.biasDtype)));
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, g.bias);
  }
  const auto layout = [&](DType dtype, int64_t rows, int64_t columns, int64_t ld) {
    cublasLtMatrixLayout_t made = nullptr;
    checkLt(lt.layoutCreate(&made, typeOf(dtype), u(rows), u(columns), ld), "a layout");
    return made;
  };
  const auto second = [&](int64_t rows) { return layout(g.dtype, g.transA ? rows : k, g.transA ? k : rows, g.lda); };
  const auto result = [&](int64_t rows) { return layout(g.yDtype, n, rows, g.ldy); };
  first_ = layout(g.dtype, g.transB ? k : n, g.transB ? n : k, g.ldb);
  second_ = second(m);
  result_ = result(m);

  cublasLtMatmulPreference_t preference = nullptr;
  checkLt(lt.preferenceCreate(&preference), "a preference");
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    checkLt(lt.preferenceSet(preference, attribute, &value, sizeof value), "a preference");
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{kWorkspace});
  // Sums that are cut along K are added in F32, never in the result's dtype.
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignmentOf(g.b));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignmentOf(g.a));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignmentOf(g.y));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignmentOf(g.y));
  found_.resize(static_cast<size_t>(most));
  int count = 0;
  const int64_t rows = std::max(m, g.wholeRows);
  const cublasLtMatrixLayout_t allSecond = rows == m ? second_ : second(rows);
  const cublasLtMatrixLayout_t allResult = rows == m ? result_ : result(rows);
  const cublasStatus_t status =
      lt.heuristic(handle_, product_, first_, allSecond, allResult, allResult, preference, most, found_.data(), &count);
  lt.preferenceDestroy(preference);
  if (rows != m) {
    lt.layoutDestroy(allSecond);
    lt.layoutDestroy(allResult);
  }
  VIADUCT_CHECK(status == CUBLAS_STATUS_SUCCESS && count > 0, "ERR_UNSUPPORTED", "matmul",
                "expected cuBLASLt to have an algorithm for " + std::to_string(m) + " x " + std::to_string(n) + " x " +
                    std::to_string(k) + " of " + dtypeName(g.dtype) + ", got none (status " +
                    std::to_string(static_cast<int>(status)) + "): align rows to 16 bytes, or cast");
  found_.resize(static_cast<size_t>(count));
}

}  // namespace

void matmulOptions(const DeviceOptions& options) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (s.lt == nullptr) s.folders = options.libraryFolders;
}

std::vector<std::string> matmulFolders() {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  return s.folders;
}

std::string matmulLibrary() {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  try {
    const size_t version = library(s).version();
    return "cuBLASLt " + std::to_string(version / 10000) + "." + std::to_string(version % 10000 / 100) + "." +
           std::to_string(version % 100);
  } catch (const Error& e) {
    return std::string("nothing yet: ") + e.what();
  }
}

size_t matmulScratch() { return kWorkspace; }

std::unique_ptr<ProductPlan> makeProductPlan(const MatmulArgs& g, int gpu, int most) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  const Lt& lt = library(s);
  cublasLtHandle_t& handle = s.handles[gpu];
  if (handle == nullptr) checkLt(lt.create(&handle), "cublasLtCreate");
  return std::make_unique<LtPlan>(lt, handle, g, most);
}

}  // namespace viaduct::cuda
