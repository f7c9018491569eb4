// Choosing the engine of attention, plans that are kept, and calls of cuDNN; see attention_engine.h.
#include "attention_engine.h"

#include <atomic>
#include <map>
#include <mutex>

#include "attention.h"
#include "attention_cut.h"
#include "attention_ranges.h"

namespace viaduct::cuda {

namespace {

enum class Engine { Auto, Cudnn, Own };
std::atomic<Engine> engine{Engine::Auto};
std::atomic<bool> deterministic{true};

#ifdef VIADUCT_EMULATE
constexpr size_t kMostPlans = 8;
#else
constexpr size_t kMostPlans = 512;  // micro-batches and prompts of so many lengths
#endif

constexpr size_t kAlignment = 256;
size_t rounded(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

/// What a call's scratch memory holds, in this order.
struct Parts {
  size_t lengths = 0;  // bytes, of one of two arrays
  size_t firstKeys = 0;
  size_t stats = 0;
  size_t workspace = 0;

  Parts(const AttentionArgs& a, bool backward, const SdpaCut& cut, const SdpaPlan& plan) {
    workspace = plan.workspace();
    if (cut.shape.lengths) lengths = rounded(static_cast<size_t>(cut.calls * cut.shape.batch) * sizeof(int32_t));
    if (cut.shape.firstKeys >= 0) firstKeys = rounded(static_cast<size_t>(a.B * firstKeysRow(a)) * sizeof(int32_t));
    if (backward && ranges()) stats = rounded(static_cast<size_t>(a.B * a.G * a.R * a.S) * sizeof(float));
  }
  size_t total() const { return 2 * lengths + firstKeys + stats + workspace; }
  /// Whether queries may see no key.
  bool ranges() const { return lengths > 0 || firstKeys > 0; }
};

/// Plans by shape, those that were used last. A command keeps its plan.
struct Plans {
  struct Kept {
    std::shared_ptr<const SdpaPlan> plan;
    std::string why;  // there is none
    uint64_t used = 0;
  };
  std::mutex mutex;
  std::map<std::vector<int64_t>, Kept> kept;
  uint64_t uses = 0;

  void forgetOldest() {
    auto oldest = kept.begin();
    for (auto each = kept.begin(); each != kept.end(); ++each) {
      if (each->second.used < oldest->second.used) oldest = each;
    }
    kept.erase(oldest);
  }
};

/// Of the process; never destroyed, because streams may run while it exits.
Plans& plans() {
  static auto* all = new Plans();
  return *all;
}

int capabilityOf(const Device& device) { return 10 * device.properties().major + device.properties().minor; }

std::shared_ptr<const SdpaPlan> findPlan(const SdpaShape& shape, const Device& device, std::string* why) {
  std::vector<int64_t> key = shape.key();
  key.push_back(device.ordinal());
  Plans& all = plans();
  std::lock_guard<std::mutex> lock(all.mutex);
  auto found = all.kept.find(key);
  if (found == all.kept.end()) {
    Plans::Kept kept;
    try {
      device.makeCurrent();
      kept.plan = makeSdpaPlan(shape, {device.ordinal(), capabilityOf(device)});
    } catch (const Error& e) {
      kept.why = e.what();
    }
    if (all.kept.size() >= kMostPlans) all.forgetOldest();
    found = all.kept.emplace(std::move(key), std::move(kept)).first;
  }
  found->second.used = ++all.uses;
  *why = found->second.why;
  return found->second.plan;
}

}  // namespace

void setAttentionEngine(const std::string& name) {
  if (name == "auto") {
    engine = Engine::Auto;
  } else if (name == "own") {
    engine = Engine::Own;
  } else {
    VIADUCT_CHECK(name == "cudnn", "ERR_UNSUPPORTED", "attention",
                  "expected engine auto, cudnn or own, got " + name + ": use one of these");
    sdpaLibrary();
    engine = Engine::Cudnn;
  }
}

void allowNondeterministicAttention(bool allowed) { deterministic = !allowed; }

std::string attentionLibrary() {
  if (engine == Engine::Own) return "own kernels";
  try {
    return sdpaLibrary() + (deterministic ? "" : " (not deterministic)") +
           (engine == Engine::Auto ? ", else own kernels" : "");
  } catch (const Error&) {
    return "own kernels, for want of cuDNN";
  }
}

AttentionChoice chooseAttention(const char* op, const AttentionArgs& a, bool backward, const Device& device) {
  AttentionChoice choice;
  const Engine wanted = engine;
  if (wanted != Engine::Own) {
    choice.gpu = {capabilityOf(device), deterministic};
    std::string why = whyNotCudnn(a, backward, choice.gpu);
    if (why.empty()) {
      const SdpaCut cut = cutForCudnn(a, backward, choice.gpu);
      choice.plan = findPlan(cut.shape, device, &why);
      if (choice.plan != nullptr) {
        choice.scratch = Parts(a, backward, cut, *choice.plan).total();
        return choice;
      }
    }
    VIADUCT_CHECK(wanted == Engine::Auto, "ERR_UNSUPPORTED", op,
                  "expected a call that cuDNN takes, got " + why + ": take attention engine auto or own");
  }
  choice.scratch = backward ? ownBackwardScratch(a) : ownForwardScratch(a);
  return choice;
}

void startChosen(const AttentionChoice& choice, const AttentionArgs& a, bool backward, const Launch& on,
                 void* scratch) {
  if (choice.plan == nullptr) return backward ? startOwnBackward(a, on, scratch) : startOwnForward(a, on, scratch);
  const SdpaCut cut = cutForCudnn(a, backward, choice.gpu);
  const SdpaShape& s = cut.shape;
  const Parts parts(a, backward, cut, *choice.plan);
  char* next = static_cast<char*>(scratch);
  const auto take = [&next](size_t bytes) {
    char* part = next;
    next += bytes;
    return part;
  };
  auto* queryLengths = reinterpret_cast<int32_t*>(take(parts.lengths));
  auto* keyLengths = reinterpret_cast<int32_t*>(take(parts.lengths));
  auto* firstKeys = reinterpret_cast<int32_t*>(take(parts.firstKeys));
  float* stats = a.lse;
  int64_t statsOfSample = a.lseBatch;
  if (s.lengths) {
    AttentionArgs seen = a;
    seen.K = s.keys;
    fillLengths(seen, cut.calls * s.batch / a.B, queryLengths, keyLengths, on);
  }
  if (parts.firstKeys > 0) copyFirstKeys(a, firstKeysRow(a), firstKeys, on);
  if (parts.stats > 0) {
    stats = reinterpret_cast<float*>(take(parts.stats));
    statsOfSample = a.G * a.R * a.S;
    copyStats(a, stats, on);
  }
  for (int64_t call = 0; call < cut.calls; ++call) {
    SdpaData data;
    const int64_t b = cut.sampleOf(call, a), g = cut.groupOf(call, a);
    const auto at = [b, g](const HeadsView& x) -> void* { return x.data == nullptr ? nullptr : x.at(b, 0, g); };
    data.q = at(a.q);
    data.k = at(a.k);
    data.v = at(a.v);
    data.out = at(a.out);
    data.dOut = at(a.dOut);
    data.dq = at(a.dq);
    data.dk = at(a.dk);
    data.dv = at(a.dv);
    data.stats = stats + b * statsOfSample + g * a.R * a.S;
    if (s.lengths) {
      data.queryLengths = queryLengths + call * s.batch;
      data.keyLengths = keyLengths + call * s.batch;
    }
    if (parts.firstKeys > 0) data.firstKeys = firstKeys + b * firstKeysRow(a);
    choice.plan->run(data, on.stream(), next);
  }
  if (parts.ranges()) backward ? clearUnseenGradients(a, on) : clearUnseeing(a, on);
}

}  // namespace viaduct::cuda
