// cuDNN's attention under emulation: plain loops on the CPU, with its masks, its roundings (probabilities and their gradients
// to the tensors' dtype) and what it leaves undefined, which is NaN here. For tests alone.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../attention_sdpa.h"
#include "block.h"

namespace viaduct::cuda {

namespace {

float load(const void* data, DType dtype, int64_t index) {
  return dtype == DType::BF16 ? toFloat(static_cast<const BF16*>(data)[index])
                              : toFloat(static_cast<const F16*>(data)[index]);
}

void store(void* data, DType dtype, int64_t index, float value) {
  if (dtype == DType::BF16) static_cast<BF16*>(data)[index] = fromFloat<BF16>(value);
  if (dtype == DType::F16) static_cast<F16*>(data)[index] = fromFloat<F16>(value);
}

float roundTo(DType dtype, float x) {
  return dtype == DType::BF16 ? toFloat(fromFloat<BF16>(x)) : toFloat(fromFloat<F16>(x));
}

void require(bool held, const std::string& what) {
  VIADUCT_CHECK(held, "ERR_UNSUPPORTED", "emulation", "expected " + what + ": cuDNN takes nothing else");
}

void requireUsable(const char* name, const void* data, size_t bytes) {
  VIADUCT_CHECK(emulation::shadow().usable(data, bytes), "ERR_NATIVE", "emulation",
                std::string("expected ") + name + " inside of a tensor, got bytes outside of any");
}

/// One tensor of a call: rows of channels.
struct Rows {
  const char* name;
  void* data;
  DType dtype;
  SdpaStrides strides;
  int64_t batch, heads, positions, channels;

  void check() const {
    require(reinterpret_cast<uintptr_t>(data) % 16 == 0, std::string(name) + " at an address of 16 bytes");
    const int64_t last = (batch - 1) * strides.batch + (heads - 1) * strides.head + (positions - 1) * strides.position;
    requireUsable(name, data, static_cast<size_t>(last + channels) * dtypeBytes(dtype));
  }
  int64_t at(int64_t b, int64_t h, int64_t i) const {
    return b * strides.batch + h * strides.head + i * strides.position;
  }
  /// All rows of a head, packed.
  std::vector<float> read(int64_t b, int64_t h) const {
    std::vector<float> all;
    for (int64_t i = 0; i < positions; ++i) {
      for (int64_t c = 0; c < channels; ++c) all.push_back(load(data, dtype, at(b, h, i) + c));
    }
    return all;
  }
  void write(int64_t b, int64_t h, int64_t i, const float* row, float factor) const {
    for (int64_t c = 0; c < channels; ++c) store(data, dtype, at(b, h, i) + c, row[c] * factor);
  }
};

float dot(const float* x, const float* y, int64_t n) {
  float sum = 0;
  for (int64_t c = 0; c < n; ++c) sum += x[c] * y[c];
  return sum;
}

void add(float* y, float factor, const float* x, int64_t n) {
  for (int64_t c = 0; c < n; ++c) y[c] += factor * x[c];
}

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

class HostPlan final : public SdpaPlan {
 public:
  explicit HostPlan(const SdpaShape& shape) : s_(shape) {}

  size_t workspace() const override {
    const auto rounded = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
    const int64_t probabilities = s_.batch * s_.heads * rounded(s_.queries, 64) * rounded(s_.keys, 128);
    return 256 + (s_.backward ? static_cast<size_t>(probabilities) * sizeof(BF16) : 0);
  }

  void run(const SdpaData& data, cudaStream_t stream, void* workspace) const override {
    emulation::settle(stream);
    requireUsable("the workspace", workspace, this->workspace());
    std::fill_n(static_cast<char*>(workspace), this->workspace(), char{-1});
    requireUsable("stats", data.stats, static_cast<size_t>(s_.batch * s_.heads * s_.queries) * sizeof(float));
    if (s_.lengths) {
      requireUsable("lengths", data.queryLengths, static_cast<size_t>(s_.batch) * sizeof(int32_t));
      requireUsable("lengths", data.keyLengths, static_cast<size_t>(s_.batch) * sizeof(int32_t));
    }
    if (s_.firstKeys >= 0) {
      require(reinterpret_cast<uintptr_t>(data.firstKeys) % 16 == 0, "first keys at an address of 16 bytes");
      const int64_t numbers = s_.firstKeys * (s_.batch - 1) + s_.queries;
      requireUsable("first keys", data.firstKeys, static_cast<size_t>(numbers) * sizeof(int32_t));
    }
    const auto queries = [&](const char* name, void* x, const SdpaStrides& strides, int64_t channels) {
      return Rows{name, x, s_.dtype, strides, s_.batch, s_.heads, s_.queries, channels};
    };
    const auto keys = [&](const char* name, void* x, const SdpaStrides& strides, int64_t channels) {
      return Rows{name, x, s_.dtype, strides, s_.batch, s_.keyHeads, s_.keys, channels};
    };
    const Rows q = queries("q", data.q, s_.q, s_.channels), out = queries("out", data.out, s_.out, s_.valueChannels);
    const Rows k = keys("k", data.k, s_.k, s_.channels), v = keys("v", data.v, s_.v, s_.valueChannels);
    for (const Rows* rows : {&q, &k, &v, &out}) rows->check();
    if (!s_.backward) {
      for (int64_t b = 0; b < s_.batch; ++b) {
        for (int64_t h = 0; h < s_.heads; ++h) forwardHead(data, q, k, v, out, b, h);
      }
      return;
    }
    const Rows dOut = queries("dOut", data.dOut, s_.dOut, s_.valueChannels);
    const Rows dq = queries("dq", data.dq, s_.dq, s_.channels);
    const Rows dk = keys("dk", data.dk, s_.dk, s_.channels), dv = keys("dv", data.dv, s_.dv, s_.valueChannels);
    for (const Rows* rows : {&dOut, &dq, &dk, &dv}) rows->check();
    for (int64_t b = 0; b < s_.batch; ++b) {
      for (int64_t g = 0; g < s_.keyHeads; ++g) backwardGroup(data, q, k, v, out, dOut, dq, dk, dv, b, g);
    }
  }

 private:
  int64_t queriesOf(const SdpaData& data, int64_t b) const { return s_.lengths ? data.queryLengths[b] : s_.queries; }
  int64_t keysOf(const SdpaData& data, int64_t b) const {
    const int64_t keys = s_.lengths ? data.keyLengths[b] : s_.keys;
    require(keys >= 1 && keys <= s_.keys, "lengths of keys from 1 to " + std::to_string(s_.keys));
    return keys;
  }
  Visible seenBy(const SdpaData& data, int64_t b, int64_t i) const {
    const int64_t keys = keysOf(data, b);
    const int64_t shift = s_.bottomRight ? keys - queriesOf(data, b) : 0;
    Visible see{0, keys};
    if (s_.causal) see.hi = std::min(see.hi, i + shift + 1);
    if (s_.window > 0) see.lo = std::max<int64_t>(0, i + shift - s_.window + 1);
    if (s_.firstKeys >= 0) see.lo = std::max<int64_t>(see.lo, data.firstKeys[b * s_.firstKeys + i]);
    if (i >= queriesOf(data, b)) see.hi = see.lo;
    return see;
  }
  float capped(float score, float* slope) const {
    if (s_.softcap == 0) return score;
    const float tanh = std::tanh(score / s_.softcap);
    if (slope != nullptr) *slope = 1 - tanh * tanh;
    return s_.softcap * tanh;
  }
  float* statsOf(const SdpaData& data, int64_t b, int64_t h) const {
    return data.stats + (b * s_.heads + h) * s_.queries;
  }
  int64_t groupOf(int64_t h) const { return h / (s_.heads / s_.keyHeads); }

  void forwardHead(const SdpaData& data, const Rows& q, const Rows& k, const Rows& v, const Rows& out, int64_t b,
                   int64_t h) const {
    const std::vector<float> queries = q.read(b, h), keys = k.read(b, groupOf(h)), values = v.read(b, groupOf(h));
    for (int64_t i = 0; i < s_.queries; ++i) {
      const Visible see = seenBy(data, b, i);
      std::vector<float> p, o(static_cast<size_t>(s_.valueChannels), see.lo < see.hi ? 0.0f : kNan);
      float top = -std::numeric_limits<float>::infinity(), sum = 0;
      for (int64_t j = see.lo; j < see.hi; ++j) {
        const float score = dot(&queries[static_cast<size_t>(i * s_.channels)],
                                &keys[static_cast<size_t>(j * s_.channels)], s_.channels);
        p.push_back(capped(score * s_.scale, nullptr));
        top = std::max(top, p.back());
      }
      for (int64_t j = see.lo; j < see.hi; ++j) {
        const float e = std::exp(p[static_cast<size_t>(j - see.lo)] - top);
        sum += e;
        add(o.data(), roundTo(s_.dtype, e), &values[static_cast<size_t>(j * s_.valueChannels)], s_.valueChannels);
      }
      out.write(b, h, i, o.data(), 1 / sum);
      statsOf(data, b, h)[i] = see.lo < see.hi ? top + std::log(sum) : kNan;
    }
  }

  void backwardGroup(const SdpaData& data, const Rows& q, const Rows& k, const Rows& v, const Rows& out,
                     const Rows& dOut, const Rows& dq, const Rows& dk, const Rows& dv, int64_t b, int64_t g) const {
    const int64_t D = s_.channels, Dv = s_.valueChannels;
    const std::vector<float> keys = k.read(b, g), values = v.read(b, g);
    std::vector<float> keySums(keys.size()), valueSums(values.size());
    const auto row = [](std::vector<float>& x, int64_t i, int64_t n) { return &x[static_cast<size_t>(i * n)]; };
    for (int64_t h = g * (s_.heads / s_.keyHeads); h < (g + 1) * (s_.heads / s_.keyHeads); ++h) {
      std::vector<float> queries = q.read(b, h), outs = out.read(b, h), gradients = dOut.read(b, h);
      for (int64_t i = 0; i < s_.queries; ++i) {
        const Visible see = seenBy(data, b, i);
        const float delta = dot(row(outs, i, Dv), row(gradients, i, Dv), Dv);
        if (std::isinf(statsOf(data, b, h)[i])) {  // a hidden key's probability is exp(-inf + inf)
          std::fill(keySums.begin(), keySums.end(), kNan);
          std::fill(valueSums.begin(), valueSums.end(), kNan);
        }
        std::vector<float> sum(static_cast<size_t>(D), see.lo < see.hi ? 0.0f : kNan);
        for (int64_t j = see.lo; j < see.hi; ++j) {
          float slope = 1;
          const float score = capped(dot(row(queries, i, D), &keys[static_cast<size_t>(j * D)], D) * s_.scale, &slope);
          const float p = std::exp(score - statsOf(data, b, h)[i]);
          const float dp = dot(row(gradients, i, Dv), &values[static_cast<size_t>(j * Dv)], Dv);
          const float ds = roundTo(s_.dtype, p * (dp - delta) * slope);
          add(row(valueSums, j, Dv), roundTo(s_.dtype, p), row(gradients, i, Dv), Dv);
          add(row(keySums, j, D), ds, row(queries, i, D), D);
          add(sum.data(), ds, &keys[static_cast<size_t>(j * D)], D);
        }
        dq.write(b, h, i, sum.data(), s_.scale);
      }
    }
    for (int64_t j = 0; j < s_.keys; ++j) {
      const float known = j < keysOf(data, b) ? 1 : kNan;
      dk.write(b, g, j, row(keySums, j, D), s_.scale * known);
      dv.write(b, g, j, row(valueSums, j, Dv), known);
    }
  }

  const SdpaShape s_;
};

}  // namespace

std::unique_ptr<SdpaPlan> makeSdpaPlan(const SdpaShape& s, const SdpaTarget&) {
  require(s.dtype == DType::BF16 || s.dtype == DType::F16, "bfloat16 or float16");
  require(s.channels % 8 == 0 && s.valueChannels % 8 == 0, "heads of a multiple of 8 channels");
  require(s.heads % s.keyHeads == 0, "as many queries in each group");
  require(!s.bottomRight || s.queries <= s.keys, "no more queries than keys");
  require(s.window == 0 || s.queries <= s.keys, "no more queries than keys in a window");
  require((s.softcap == 0 && s.firstKeys < 0) || !s.lengths, "no lengths with a softcap or first keys");
  for (const SdpaStrides* x : {&s.q, &s.k, &s.v, &s.out, &s.dOut, &s.dq, &s.dk, &s.dv}) {
    require(x->batch % 8 == 0 && x->head % 8 == 0 && x->position % 8 == 0, "strides of 16 bytes");
  }
  return std::make_unique<HostPlan>(s);
}

std::string sdpaLibrary() { return "plain loops, emulated"; }

void sdpaOptions(const DeviceOptions&) {}

}  // namespace viaduct::cuda
