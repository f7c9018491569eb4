// Plans of matrix products that are kept, and which of a plan's algorithms computes a product: the library's best guess, or the
// fastest, timed on the GPU at the first call of a form. What was chosen holds for the process, so equal calls have equal bits.
#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <tuple>

#include "matmul.h"

namespace viaduct::cuda {

namespace {

constexpr int kMostAlgorithms = 8;
constexpr int kTimed = 3;                              // runs of an algorithm, behind one that warms up
constexpr float kFaster = 0.98f;                       // of the time of an earlier one: less is noise
constexpr size_t kMostSpareBytes = size_t{256} << 20;  // the main gradient of a large layer

// Smaller products gain little. Products that all ranks of a group compute alike and compare, as routers' logits, are smaller:
// their bits must not depend on what a rank has timed.
#ifdef VIADUCT_EMULATE
constexpr int64_t kLeastSide = 16;
#else
constexpr int64_t kLeastSide = 512;
#endif

/// Everything that an algorithm depends on. Alignments are powers of two up to 256 bytes.
using Form = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, DType, DType, bool, bool,
                        bool, bool, Epilogue, std::tuple<uint32_t, uint32_t, uint32_t, uint32_t>>;

struct State {
  std::mutex mutex;
  bool tuned = false;
  std::map<Form, std::unique_ptr<ProductPlan>> plans;
  std::set<Form> refused;         // with an epilogue
  std::map<Form, size_t> chosen;  // by the form of the whole product
};

/// Of the process; never destroyed, because streams may run while it exits.
State& state() {
  static auto* s = new State();
  return *s;
}

uint32_t alignmentOf(const void* data) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  uint32_t alignment = 256;
  while (address % alignment != 0) alignment /= 2;
  return alignment;
}

int64_t rowsOf(const MatmulArgs& g) { return std::max(g.shape.m, g.wholeRows); }

Form formOf(const MatmulArgs& g, int gpu, int64_t m) {
  return {
      gpu,          m,
      rowsOf(g),    g.shape.n,
      g.shape.k,    g.ldy,
      g.lda,        g.ldb,
      g.dtype,      g.yDtype,
      g.transA,     g.transB,
      g.accumulate, g.bias != nullptr,
      g.epilogue,   {alignmentOf(g.y), alignmentOf(g.a), alignmentOf(g.b), g.pre == nullptr ? 0 : alignmentOf(g.pre)}};
}

bool worthTiming(const MatmulArgs& g) {
  return g.shape.m == rowsOf(g) && std::min({g.shape.m, g.shape.n, g.shape.k}) >= kLeastSide;
}

size_t resultBytes(const MatmulArgs& g) {
  return static_cast<size_t>((g.shape.m - 1) * g.ldy + g.shape.n) * dtypeBytes(g.yDtype);
}

struct TimedEvent {
  cudaEvent_t event = nullptr;
  TimedEvent() { check(cudaEventCreate(&event), "cudaEventCreate"); }
  ~TimedEvent() { cudaEventDestroy(event); }
  TimedEvent(const TimedEvent&) = delete;
  TimedEvent& operator=(const TimedEvent&) = delete;
};

/// Waits for the GPU. An algorithm that does not take the call is passed over; where none does, the first's error is the call's.
size_t fastest(ProductPlan& plan, const MatmulArgs& g, const Lane& lane, void* result) {
  const TimedEvent begin, end;
  size_t best = 0;
  float bestTime = 0;
  for (size_t each = 0; each < plan.algorithms(); ++each) {
    const auto run = [&] { plan.start(each, g, result, lane); };
    try {
      run();
    } catch (const Error&) {
      continue;
    }
    check(cudaEventRecord(begin.event, lane.stream), "cudaEventRecord");
    for (int i = 0; i < kTimed; ++i) run();
    check(cudaEventRecord(end.event, lane.stream), "cudaEventRecord");
    check(cudaEventSynchronize(end.event), "cudaEventSynchronize");
    float time = 0;
    check(cudaEventElapsedTime(&time, begin.event, end.event), "cudaEventElapsedTime");
    if (bestTime == 0 || time < kFaster * bestTime) {
      best = each;
      bestTime = time;
    }
  }
  return best;
}

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace

void setMatmulTuning(const std::string& engine) {
  VIADUCT_CHECK(engine == "auto" || engine == "tuned", "ERR_UNSUPPORTED", "matmul",
                "expected engine auto or tuned, got " + engine + ": use one of these");
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (s.tuned == (engine == "tuned")) return;
  s.tuned = !s.tuned;
  s.plans.clear();
  s.refused.clear();
  s.chosen.clear();
}

bool matmulTuned() {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  return s.tuned;
}

size_t matmulSpare(const MatmulArgs& g, int gpu) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (!s.tuned || !g.accumulate || !worthTiming(g) || resultBytes(g) > kMostSpareBytes) return 0;
  return s.chosen.count(formOf(g, gpu, rowsOf(g))) > 0 ? 0 : resultBytes(g);
}

bool matmulTakes(const MatmulArgs& g, int gpu) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  const Form form = formOf(g, gpu, g.shape.m);
  if (s.plans.count(form) > 0) return true;
  if (s.refused.count(form) > 0) return false;
  try {
    s.plans[form] = makeProductPlan(g, gpu, s.tuned ? kMostAlgorithms : 1);
    return true;
  } catch (const Error&) {
    s.plans.erase(form);
    s.refused.insert(form);
    return false;
  }
}

void startMatmul(const MatmulArgs& g, const Lane& lane, void* spare) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  std::unique_ptr<ProductPlan>& plan = s.plans[formOf(g, lane.gpu, g.shape.m)];
  if (plan == nullptr) plan = makeProductPlan(g, lane.gpu, s.tuned ? kMostAlgorithms : 1);
  size_t algorithm = 0;
  if (s.tuned) {
    // The first call decides, also for rows of the product that are computed apart.
    const Form whole = formOf(g, lane.gpu, rowsOf(g));
    auto found = s.chosen.find(whole);
    if (found == s.chosen.end()) {
      const bool timed = worthTiming(g) && (!g.accumulate || spare != nullptr) && !capturing(lane.stream);
      void* result = g.accumulate ? spare : g.y;
      found = s.chosen.emplace(whole, timed ? fastest(*plan, g, lane, result) : size_t{0}).first;
    }
    algorithm = found->second;
  }
  plan->start(algorithm, g, g.y, lane);
}

}  // namespace viaduct::cuda
