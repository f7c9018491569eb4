// Dropout and normal numbers by place: what an element draws depends on its logical coordinates alone, never on a
// layout.
//
// Dropout, element (t, channel): key (seed, step); counter word 0 = channel / 4, word 1 = positions[t], word 2 = the
// low 32 bits of sampleIds[t], word 3 = site (16 bits) + bits 32 to 47 of sampleIds[t] << 16; the draw is word
// channel % 4 of the block. Normal numbers, logical index i: key (seed, nameHash); counter = (i / 4 low, i / 4 high,
// 0, 0); a pair of words gives a pair of numbers by Box-Muller: words 0, 1 for i % 4 = 0 (cosine) and 1 (sine), words
// 2, 3 for 2 and 3.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/random.cc"
#include "vectors.h"
// after vectors.h, which chooses the instruction sets
#include "hwy/contrib/math/math-inl.h"

#ifndef VIADUCT_CPU_RANDOM
#define VIADUCT_CPU_RANDOM
#include "../ids.h"
#include "../philox.h"
namespace viaduct::cpu {

constexpr int64_t kDraws = 1024;  // words drawn at a time

struct DropoutArgs {
  DType dtype;
  void* y;
  const void* x;
  TensorRef sampleIds, positions;
  PhiloxKey key;
  int64_t rows, columns;
  uint32_t site;
  int64_t channelStart;
  uint32_t threshold;  // draws below are dropped
  float scale;
};

}  // namespace viaduct::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {
namespace {

using VU = hn::Vec<DU>;

// High and low words of the 64-bit products of the lanes with m.
HWY_INLINE void MultiplyWide(VU a, VU m, VU* high, VU* low) {
  const DU du;
  const hn::Repartition<uint64_t, DU> dw;
  const auto even = hn::MulEven(a, m);
  const auto odd = hn::MulEven(hn::BitCast(du, hn::ShiftRight<32>(hn::BitCast(dw, a))), m);
  *high = hn::OddEven(hn::BitCast(du, odd), hn::BitCast(du, hn::ShiftRight<32>(even)));
  *low = hn::OddEven(hn::BitCast(du, hn::ShiftLeft<32>(odd)), hn::BitCast(du, even));
}

// The blocks of counters (first, c1, c2, c3), (first + 1, ...), ... as words in order; `blocks` is rounded up to
// whole vectors.
HWY_INLINE void DrawBlocks(uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, PhiloxKey key, int64_t blocks,
                           uint32_t* out) {
  const DU du;
  const VU m0 = hn::Set(du, kPhiloxM0), m1 = hn::Set(du, kPhiloxM1);
  for (int64_t b = 0; b < blocks; b += kLanes) {
    VU w0 = hn::Iota(du, first + static_cast<uint32_t>(b)), w1 = hn::Set(du, c1), w2 = hn::Set(du, c2),
       w3 = hn::Set(du, c3);
    uint32_t k0 = key.word[0], k1 = key.word[1];
    for (int round = 0; round < kPhiloxRounds; ++round) {
      VU high0, low0, high1, low1;
      MultiplyWide(w0, m0, &high0, &low0);
      MultiplyWide(w2, m1, &high1, &low1);
      w0 = hn::Xor(hn::Xor(high1, w1), hn::Set(du, k0));
      w2 = hn::Xor(hn::Xor(high0, w3), hn::Set(du, k1));
      w1 = low1;
      w3 = low0;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    hn::StoreInterleaved4(w0, w1, w2, w3, du, out + 4 * b);
  }
}

template <typename T>
void DropoutLoop(const DropoutArgs& args) {
  const DropoutArgs a = args;
  const Ids samples(a.sampleIds), positions(a.positions);
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const int64_t pieces = (a.columns + kDraws - 1) / kDraws;
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, std::min(kDraws, a.columns)));
  parallelChunks(a.rows * pieces, grain, [=](int64_t firstTask, int64_t lastTask) HWY_ATTR {
    const V scale = Set(a.scale);
    const auto threshold = hn::Set(DU(), a.threshold);
    uint32_t draws[kDraws + 8 * kLanes + 4];
    for (int64_t task = firstTask; task < lastTask; ++task) {
      const int64_t t = task / pieces, begin = task % pieces * kDraws, n = std::min(kDraws, a.columns - begin);
      const int64_t channel = a.channelStart + begin, skip = channel % 4;
      const uint64_t sample = static_cast<uint64_t>(samples[t]);
      DrawBlocks(static_cast<uint32_t>(channel / 4), static_cast<uint32_t>(positions[t]), static_cast<uint32_t>(sample),
                 a.site | static_cast<uint32_t>(sample >> 32) << 16, a.key, (skip + n + 3) / 4, draws);
      const uint32_t* draw = draws + skip;
      const T* from = x + t * a.columns + begin;
      T* to = y + t * a.columns + begin;
      ForVectors(n, [=](int64_t i, int64_t m) HWY_ATTR {
        const auto dropped = hn::RebindMask(DF(), hn::Lt(hn::LoadU(DU(), draw + i), threshold));
        Store(hn::IfThenZeroElse(dropped, hn::Mul(Load(from + i, m), scale)), to + i, m);
      });
    }
  });
}

// Box-Muller in F64: words 2k and 2k + 1 give the numbers 2k (cosine) and 2k + 1 (sine). pairs is rounded up to whole
// vectors; what an element gets does not depend on its lane.
HWY_INLINE void BoxMuller(const uint32_t* words, double* numbers, int64_t pairs) {
  const DD d;
  constexpr int64_t kDoubles = static_cast<int64_t>(hn::MaxLanes(DD()));
  alignas(64) double uniform[kDoubles], angle[kDoubles];
  for (int64_t k = 0; k < pairs; k += kDoubles) {
    for (int64_t i = 0; i < kDoubles; ++i) {
      uniform[i] = (words[2 * (k + i)] + 1.0) * 0x1p-32;  // in (0, 1]
      angle[i] = words[2 * (k + i) + 1] * (0x1p-32 * 6.283185307179586476925286766559);
    }
    const VD radius = hn::Sqrt(hn::Mul(hn::Set(d, -2.0), hn::Log(d, hn::Load(d, uniform))));
    const VD turn = hn::Load(d, angle);
    hn::StoreInterleaved2(hn::Mul(radius, hn::Cos(d, turn)), hn::Mul(radius, hn::Sin(d, turn)), d, numbers + 2 * k);
  }
}

// numbers[k] = the number of logical index first + k * step, k in [0, n), n <= kDraws.
void NormalKernel(double* numbers, int64_t first, int64_t step, int64_t n, PhiloxKey key) {
  uint32_t words[2 * kDraws + 8 * kLanes + 8];
  double pairs[2 * kDraws + 8 * kLanes + 8];
  const int64_t firstBlock = first >> 2, blocks = ((first + n - 1) >> 2) - firstBlock + 1;
  if (step == 1 && (firstBlock >> 32) == ((firstBlock + blocks) >> 32)) {
    DrawBlocks(static_cast<uint32_t>(firstBlock), static_cast<uint32_t>(firstBlock >> 32), 0, 0, key, blocks, words);
    BoxMuller(words, pairs, 2 * blocks);
    std::memcpy(numbers, pairs + (first & 3), static_cast<size_t>(n) * sizeof(double));
    return;
  }
  for (int64_t k = 0; k < n; ++k) {
    const uint64_t i = static_cast<uint64_t>(first + k * step), block = i >> 2;
    const PhiloxBlock b = philox({{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 0}}, key);
    words[2 * k] = b.word[i & 2];
    words[2 * k + 1] = b.word[(i & 2) + 1];
  }
  std::memset(words + 2 * n, 0, 2 * kLanes * sizeof(uint32_t));
  BoxMuller(words, pairs, n);
  for (int64_t k = 0; k < n; ++k) numbers[k] = pairs[2 * k + ((first + k * step) & 1)];
}

void DropoutKernel(const DropoutArgs& a) { a.dtype == DType::F32 ? DropoutLoop<float>(a) : DropoutLoop<BF16>(a); }

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <cmath>

#include "../checks/ops.h"
#include "cpu_backend.h"

namespace viaduct::cpu {

HWY_EXPORT(DropoutKernel);
HWY_EXPORT(NormalKernel);

void CpuBackend::dropout(Stream& s, Out y, In x, In rng, In sampleIds, In positions, int64_t site, int64_t channelStart,
                         double p) {
  checkDropout(y, x, rng, sampleIds, positions, site, channelStart, p);
  s.enqueue("dropout", [=] {
    const int64_t* seedAndStep = rng.as<int64_t>();
    DropoutArgs a;
    a.dtype = x.dtype, a.y = y.data, a.x = x.data, a.sampleIds = sampleIds, a.positions = positions;
    a.key = philoxKey(seedAndStep[0], seedAndStep[1], kUseDropout);
    a.rows = x.dim(0), a.columns = x.dim(1), a.site = static_cast<uint32_t>(site), a.channelStart = channelStart;
    a.threshold = static_cast<uint32_t>(std::min(std::floor(p * 0x1p32 + 0.5), 0x1p32 - 1));
    a.scale = static_cast<float>(1.0 / (1.0 - p));
    HWY_DYNAMIC_DISPATCH(DropoutKernel)(a);
  });
}

namespace {

struct NormalStream {
  PhiloxKey key;
  double mean, std;
};

template <typename T>
void normalElements(const TensorRef& y, const NormalStream& stream, const Dims& start, const Dims& logicalStride) {
  const int last = y.ndim - 1;
  const int64_t width = y.ndim > 0 ? y.shape[last] : 1, total = y.numel();
  parallelChunks(total, 8192, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      int64_t index = begin, at = 0, logical = 0, column = 0;
      for (int d = last; d >= 0; --d) {
        const int64_t i = index % y.shape[d];
        index /= y.shape[d];
        at += i * y.stride[d];
        logical += (start.v[d] + i) * logicalStride.v[d];
        if (d == last) column = i;
      }
      const int64_t n = std::min({end - begin, width - column, kDraws});
      const int64_t stride = last >= 0 ? y.stride[last] : 1;
      double numbers[kDraws];
      HWY_DYNAMIC_DISPATCH(NormalKernel)(numbers, logical, last >= 0 ? logicalStride.v[last] : 1, n, stream.key);
      T* out = y.as<T>() + at;
      for (int64_t k = 0; k < n; ++k)
        out[k * stride] = fromFloat<T>(static_cast<float>(stream.mean + stream.std * numbers[k]));
      begin += n;
    }
  });
}

}  // namespace

void CpuBackend::randomNormal(Stream& s, Out y, int64_t seed, int64_t nameHash, Dims start, Dims logicalStride,
                              double mean, double std) {
  checkRandomNormal(y, start, logicalStride);
  if (y.numel() == 0) return;
  s.enqueue("randomNormal", [=] {
    const PhiloxKey key = philoxKey(seed, nameHash, kUseNormal);
    if (y.dtype == DType::F32) {
      normalElements<float>(y, {key, mean, std}, start, logicalStride);
    } else {
      normalElements<BF16>(y, {key, mean, std}, start, logicalStride);
    }
  });
}

}  // namespace viaduct::cpu
#endif  // HWY_ONCE
