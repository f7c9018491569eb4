// Which calls cuDNN takes, and what they are to it; see attention_cut.h.
#include "attention_cut.h"

#include <algorithm>
#include <initializer_list>
#include <utility>

namespace viaduct::cuda {

namespace {

constexpr int64_t kPack = 8;  // elements of 16 bytes: what cuDNN loads at a time
// Fewer queries behind a cache are decoding: each token would be another shape, and own kernels cut the keys.
constexpr int64_t kLeastQueries = 16;

// Its deterministic backward pass keeps every probability of a call, but on Blackwell. So a call takes groups up to so many
// bytes of them as keep a GPU at work, at least one, and a group may have no more than the most.
#ifdef VIADUCT_EMULATE
constexpr int64_t kEnoughProbabilities = int64_t{128} << 10, kMostProbabilities = int64_t{256} << 10;
#else
constexpr int64_t kEnoughProbabilities = int64_t{512} << 20, kMostProbabilities = int64_t{2} << 30;
#endif

/// Keys that some query may see; those behind them no call needs.
int64_t seenKeys(const AttentionArgs& a) { return a.causal ? std::min(a.K, a.queryOffset + a.S) : a.K; }

/// The window where it hides anything.
int64_t narrowWindow(const AttentionArgs& a) { return a.window > 0 && a.window < a.queryOffset + a.S ? a.window : 0; }

bool diagonal(const AttentionArgs& a) { return a.causal || narrowWindow(a) > 0; }

/// Whether the heads of all groups lie evenly apart.
bool even(const AttentionArgs& a, const HeadsView& x) { return a.G == 1 || a.R == 1 || x.group == a.R * x.head; }

/// Bytes of probabilities that a call keeps for one group of one sample.
int64_t probabilitiesOf(const AttentionArgs& a, bool backward, const SdpaGpu& gpu) {
  if (!backward || !gpu.deterministic || gpu.computeCapability / 10 == 10) return 0;
  const auto rounded = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  return a.R * rounded(a.S, 64) * rounded(a.K, 128) * 2;
}

/// Whether one call takes all samples and groups.
bool whole(const AttentionArgs& a, bool backward, const SdpaGpu& gpu) {
  if (probabilitiesOf(a, backward, gpu) > kEnoughProbabilities / (a.B * a.G)) return false;
  return even(a, a.q) && even(a, a.out) && (!backward || (even(a, a.dOut) && even(a, a.dq)));
}

/// Groups of a sample that one of its calls takes.
int64_t groupsOfCall(const AttentionArgs& a, bool backward, const SdpaGpu& gpu) {
  const int64_t each = probabilitiesOf(a, backward, gpu);
  int64_t groups = a.G;
  while (groups > 1 && (each > kEnoughProbabilities / groups || a.G % groups != 0)) groups -= 1;
  return groups;
}

/// A view that cuDNN sees, with its sizes.
struct Seen {
  const char* name;
  const HeadsView* view;
  int64_t positions, heads, channels;  // heads: of a group
};

std::vector<Seen> seenViews(const AttentionArgs& a, bool backward) {
  std::vector<Seen> views{
      {"q", &a.q, a.S, a.R, a.D}, {"k", &a.k, a.K, 1, a.D}, {"v", &a.v, a.K, 1, a.Dv}, {"out", &a.out, a.S, a.R, a.Dv}};
  if (!backward) return views;
  for (const Seen& gradient : {Seen{"dOut", &a.dOut, a.S, a.R, a.Dv}, Seen{"dq", &a.dq, a.S, a.R, a.D},
                               Seen{"dk", &a.dk, a.K, 1, a.D}, Seen{"dv", &a.dv, a.K, 1, a.Dv}}) {
    views.push_back(gradient);
  }
  return views;
}

std::string whyNotMemory(const AttentionArgs& a, const Seen& x) {
  const std::string name = x.name;
  if (reinterpret_cast<uintptr_t>(x.view->data) % 16 != 0) return name + " at an address of no 16 bytes";
  int64_t last = x.channels - 1;
  const std::pair<int64_t, int64_t> axes[] = {
      {a.B, x.view->batch}, {x.positions, x.view->position}, {a.G, x.view->group}, {x.heads, x.view->head}};
  for (const auto& [size, stride] : axes) {
    if (size == 1) continue;
    if (stride <= 0 || stride % kPack != 0) return name + " with a stride of no 16 bytes";
    last += (size - 1) * stride;
  }
  return last < int64_t{1} << 31 ? "" : name + " over more than 2^31 elements";
}

std::string whyNotMask(const AttentionArgs& a, bool backward, const SdpaGpu& gpu) {
  if (a.firstKey != nullptr) {
    if (a.keyEnd != nullptr) return "first keys and ends of keys";
    if (backward && gpu.computeCapability / 10 != 9) return "the gradient with first keys on a GPU that is no Hopper";
  }
  if (a.keyEnd != nullptr && a.softcap > 0) return "ends of keys and a softcap";
  if (a.queryOffset < 0) return "queries before the first key";
  if (!diagonal(a)) return "";
  const int64_t keys = seenKeys(a), window = narrowWindow(a);
  const bool bottomRight = a.queryOffset > 0;
  if (bottomRight && a.queryOffset != keys - a.S) return "queries that stand neither at the first keys nor at the last";
  if (bottomRight && a.keyEnd != nullptr) return "ends of keys behind a cache";
  if (window > 0 && a.S > keys) return "a window and more queries than keys";
  if (backward && (keys < a.K || (window > 0 && window <= a.queryOffset))) return "gradients of keys that none sees";
  return "";
}

std::string whyNotHeads(const AttentionArgs& a, bool backward, const SdpaGpu& gpu) {
  if (a.D % kPack != 0 || a.Dv % kPack != 0) return "channels of no multiple of 8";
  if (a.D > 256 || a.Dv > 256) return "more than 256 channels";
  if (!backward) return "";
  const int generation = gpu.computeCapability / 10;
  if (generation == 9) return "";
  if (a.softcap > 0) return "the gradient of a softcap on a GPU that is no Hopper";
  const bool latent = generation == 10 && a.D == 192 && a.Dv == 128;
  return (a.D <= 128 && a.Dv <= 128) || latent ? "" : "gradients of more than 128 channels on a GPU that is no Hopper";
}

/// Strides of a tensor's axes. An axis of size 1 has any: then one that keeps the alignment.
SdpaStrides strides(const SdpaStrides& x, int64_t batch, int64_t heads, int64_t positions, int64_t channels) {
  SdpaStrides y;
  const auto put = [&](int64_t* to, int64_t size, int64_t stride) {
    if (size > 1) *to = stride;
  };
  put(&y.batch, batch, x.batch);
  put(&y.head, heads, x.head);
  put(&y.position, positions, x.position);
  const int64_t span = std::max({channels, batch * y.batch, heads * y.head, positions * y.position});
  for (int64_t* stride : {&y.position, &y.head, &y.batch}) {
    if (*stride == 0) *stride = span;
  }
  return y;
}

}  // namespace

std::vector<int64_t> SdpaShape::key() const {
  std::vector<int64_t> key{backward,      static_cast<int64_t>(dtype),
                           batch,         heads,
                           keyHeads,      queries,
                           keys,          channels,
                           valueChannels, causal,
                           bottomRight,   window,
                           lengths,       firstKeys};
  key.push_back(backward && deterministic);
  for (float x : {scale, softcap}) key.push_back(bitsOf(x));
  for (const SdpaStrides* x : {&q, &k, &v, &out, &dOut, &dq, &dk, &dv}) {
    key.insert(key.end(), {x->batch, x->head, x->position});
  }
  return key;
}

std::string whyNotCudnn(const AttentionArgs& a, bool backward, const SdpaGpu& gpu) {
  if (a.q.dtype != DType::BF16 && a.q.dtype != DType::F16) return dtypeName(a.q.dtype);
  if (std::min({a.B, a.S, a.G, a.R, a.K}) == 0) return "nothing to compute";
  if (backward && a.S == 1 && a.K == 1) return "the gradient of one query and one key";
  if (probabilitiesOf(a, backward, gpu) > kMostProbabilities) {
    return "a gradient for which it would keep more than " + std::to_string(kMostProbabilities) +
           " bytes of probabilities of a group";
  }
  if (!backward && a.S < kLeastQueries && a.S < a.K) return "few queries over more keys";
  if (gpu.computeCapability < 80) return "a GPU before compute capability 8.0";
  std::string why = whyNotHeads(a, backward, gpu);
  if (why.empty()) why = whyNotMask(a, backward, gpu);
  for (const Seen& view : seenViews(a, backward)) {
    if (why.empty()) why = whyNotMemory(a, view);
  }
  const int64_t heads = a.G * a.R;
  const bool packed = (a.S == 1 || a.lseQuery == 1) && (heads == 1 || a.lseHead == a.S) &&
                      (a.B == 1 || !whole(a, backward, gpu) || a.lseBatch == heads * a.S);
  if (why.empty() && !packed) why = "an lse with gaps";
  return why;
}

SdpaCut cutForCudnn(const AttentionArgs& a, bool backward, const SdpaGpu& gpu) {
  SdpaCut cut;
  SdpaShape& s = cut.shape;
  const bool one = whole(a, backward, gpu);
  cut.groups = one ? a.G : groupsOfCall(a, backward, gpu);
  cut.calls = one ? 1 : a.B * (a.G / cut.groups);
  s.backward = backward;
  s.deterministic = gpu.deterministic;
  s.dtype = a.q.dtype;
  s.batch = one ? a.B : cut.groups;
  s.heads = one ? a.G * a.R : a.R;
  s.keyHeads = one ? a.G : 1;
  s.queries = a.S;
  s.keys = seenKeys(a);
  s.channels = a.D;
  s.valueChannels = a.Dv;
  s.scale = a.scale;
  s.softcap = a.softcap > 0 ? a.softcap : 0;
  s.causal = a.causal;
  s.window = narrowWindow(a);
  s.bottomRight = diagonal(a) && a.queryOffset > 0;
  s.lengths = a.keyEnd != nullptr;
  if (a.firstKey != nullptr) s.firstKeys = one ? firstKeysRow(a) : 0;
  const auto queryLike = [&](const HeadsView& x, int64_t channels) {
    const SdpaStrides all =
        one ? SdpaStrides{x.batch, a.R > 1 ? x.head : x.group, x.position} : SdpaStrides{x.group, x.head, x.position};
    return strides(all, s.batch, s.heads, a.S, channels);
  };
  const auto keyLike = [&](const HeadsView& x, int64_t channels) {
    const SdpaStrides all = one ? SdpaStrides{x.batch, x.group, x.position} : SdpaStrides{x.group, 0, x.position};
    return strides(all, s.batch, s.keyHeads, s.keys, channels);
  };
  s.q = queryLike(a.q, a.D);
  s.k = keyLike(a.k, a.D);
  s.v = keyLike(a.v, a.Dv);
  s.out = queryLike(a.out, a.Dv);
  if (!backward) return cut;
  s.dOut = queryLike(a.dOut, a.Dv);
  s.dq = queryLike(a.dq, a.D);
  s.dk = keyLike(a.dk, a.D);
  s.dv = keyLike(a.dv, a.Dv);
  return cut;
}

}  // namespace viaduct::cuda
