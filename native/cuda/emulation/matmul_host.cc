// The matrix product under emulation: plain loops on the CPU in place of cuBLASLt. For tests alone. Its algorithms are alike but
// for the time that the stream's events then show, and for one that takes no call.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>
#include <utility>
#include <vector>

#include "../../half.h"
#include "../matmul.h"
#include "block.h"
#include "matmul_host.h"
#include "pending.h"

namespace viaduct::cuda {

namespace {

float load(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::F32) return static_cast<const float*>(data)[index];
  if (dtype == DType::BF16) return toFloat(static_cast<const BF16*>(data)[index]);
  return toFloat(static_cast<const F16*>(data)[index]);
}

void store(void* data, DType dtype, int64_t index, float value) {
  if (dtype == DType::F32) static_cast<float*>(data)[index] = value;
  if (dtype == DType::BF16) static_cast<BF16*>(data)[index] = fromFloat<BF16>(value);
  if (dtype == DType::F16) static_cast<F16*>(data)[index] = fromFloat<F16>(value);
}

void requireUsable(const char* name, const void* data, DType dtype, int64_t rows, int64_t columns, int64_t ld) {
  if (rows == 0 || columns == 0) return;
  const size_t bytes = static_cast<size_t>((rows - 1) * ld + columns) * dtypeBytes(dtype);
  VIADUCT_CHECK(emulation::shadow().usable(data, bytes), "ERR_NATIVE", "emulation",
                std::string("expected ") + name + " inside of a tensor, got bytes outside of any");
}

/** A [rows, columns] in float32, packed; of a transposed one, the stored is [columns, rows]. */
std::vector<float> packed(const void* data, DType dtype, bool transposed, int64_t rows, int64_t columns, int64_t ld) {
  std::vector<float> all(static_cast<size_t>(rows * columns));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      all[static_cast<size_t>(i * columns + j)] = load(data, dtype, transposed ? j * ld + i : i * ld + j);
    }
  }
  return all;
}

float ended(Epilogue epilogue, float x) {
  if (epilogue == Epilogue::Relu) return std::max(x, 0.0f);
  if (epilogue == Epilogue::GeluTanh) return 0.5f * x * (1 + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
  return x;
}

void product(const MatmulArgs& g, void* result) {
  const auto [m, n, k] = g.shape;
  requireUsable("y", result, g.yDtype, m, n, g.ldy);
  requireUsable("a", g.a, g.dtype, g.transA ? k : m, g.transA ? m : k, g.lda);
  requireUsable("b", g.b, g.dtype, g.transB ? n : k, g.transB ? k : n, g.ldb);
  if (g.pre != nullptr) requireUsable("pre", g.pre, g.yDtype, m, n, n);
  if (g.bias != nullptr) requireUsable("bias", g.bias, g.biasDtype, 1, n, n);
  const std::vector<float> a = packed(g.a, g.dtype, g.transA, m, k, g.lda);
  const std::vector<float> b = packed(g.b, g.dtype, g.transB, k, n, g.ldb);
  std::vector<float> row(static_cast<size_t>(n));
  for (int64_t i = 0; i < m; ++i) {
    std::fill(row.begin(), row.end(), 0.0f);
    for (int64_t p = 0; p < k; ++p) {
      const float scale = a[static_cast<size_t>(i * k + p)];
      const float* other = b.data() + p * n;
      for (int64_t j = 0; j < n; ++j) row[static_cast<size_t>(j)] += scale * other[j];
    }
    for (int64_t j = 0; j < n; ++j) {
      float sum = row[static_cast<size_t>(j)];
      if (g.bias != nullptr) sum += load(g.bias, g.biasDtype, j);
      if (g.accumulate) sum += load(g.y, g.yDtype, i * g.ldy + j);
      if (g.pre != nullptr) store(g.pre, g.yDtype, i * n + j, sum);
      store(result, g.yDtype, i * g.ldy + j, ended(g.epilogue, sum));
    }
  }
}

std::atomic<bool> delayed{false};

void productLater(const MatmulArgs& g, void* result, cudaStream_t stream) {
  const auto before = stream->pending.get();
  static std::atomic<int> next{0};
  const std::chrono::milliseconds late(5 + 20 * (next++ % 4));
  const auto running = std::make_shared<emulation::Pending>();
  stream->pending.add({running});
  std::thread([=] {
    for (const auto& each : before) each->wait();
    std::this_thread::sleep_for(late);
    product(g, result);
    running->finish();
  }).detach();
}

std::vector<int64_t> starts(emulation::kProductTimes.size());
int64_t groupedStarts = 0;

class LoopsPlan final : public ProductPlan {
 public:
  explicit LoopsPlan(size_t algorithms) : algorithms_(algorithms) {}
  size_t algorithms() const override { return algorithms_; }
  void start(size_t algorithm, const MatmulArgs& g, void* result, const Lane& lane) override {
    starts.at(algorithm) += 1;
    const int microseconds = emulation::kProductTimes[algorithm];
    VIADUCT_CHECK(microseconds > 0, "ERR_NATIVE", "matmul", "expected an algorithm that takes the call, got another");
    if (delayed) {
      productLater(g, result, lane.stream);
    } else {
      emulation::settle(lane.stream);
      product(g, result);
    }
    emulation::spend(lane.stream, std::chrono::microseconds(microseconds));
  }

 private:
  const size_t algorithms_;
};

}  // namespace

void matmulOptions(const DeviceOptions&) {}

std::string matmulLibrary() { return "plain loops, emulated"; }

size_t matmulScratch() { return 0; }

std::unique_ptr<ProductPlan> makeProductPlan(const MatmulArgs&, int, int most) {
  return std::make_unique<LoopsPlan>(std::min(static_cast<size_t>(most), emulation::kProductTimes.size()));
}

bool startGrouped(const std::vector<MatmulArgs>& products, void* const* pointers, const Lane& lane) {
  groupedStarts += 1;
  if (products[0].yDtype != products[0].dtype) return false;
  emulation::settle(lane.stream);
  const size_t count = products.size();
  VIADUCT_CHECK(emulation::shadow().usable(pointers, 3 * count * sizeof(void*)), "ERR_NATIVE", "emulation",
                "expected the matrices' addresses in memory of the GPU, got bytes outside of any");
  for (size_t e = 0; e < count; ++e) {
    MatmulArgs g = products[e];
    g.b = pointers[e];
    g.a = pointers[count + e];
    g.y = pointers[2 * count + e];
    product(g, g.y);
  }
  return true;
}

}  // namespace viaduct::cuda

void viaduct::emulation::delayProducts(bool delayed) { cuda::delayed = delayed; }

int64_t viaduct::emulation::takeGroupedStarts() { return std::exchange(cuda::groupedStarts, 0); }

std::vector<int64_t> viaduct::emulation::takeProductStarts() {
  std::vector<int64_t> taken(cuda::starts.size());
  taken.swap(cuda::starts);
  return taken;
}
