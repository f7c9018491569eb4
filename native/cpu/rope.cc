// Rotary position embedding, in place, over heads of any stride. Halves pair channel i with i + R/2, interleaved pairs
// 2i with 2i + 1. Computed in F32 and rounded once; the inverse rotates by the negative angle.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/rope.cc"
#include "rows.h"
#include "vectors.h"

#ifndef VIADUCT_CPU_ROPE
#define VIADUCT_CPU_ROPE
#include "../checks/ops.h"
#include "../ids.h"
namespace viaduct::cpu {

struct RopeArgs {
  TensorRef x, positions;
  const float* cos = nullptr;
  const float* sin = nullptr;
  int64_t cosStride = 0, sinStride = 0;  // elements from one position to the next
  int64_t half = 0;                      // R / 2
  bool interleaved = false, inverse = false;
};

}  // namespace viaduct::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {
namespace {

template <typename T>
HWY_INLINE void RotateHalves(T* x, const float* cos, const float* sin, int64_t half, V sign) {
  ForVectors(half, [=](int64_t i, int64_t n) HWY_ATTR {
    const V a = Load(x + i, n), b = Load(x + half + i, n);
    const V c = Load(cos + i, n), s = hn::Mul(Load(sin + i, n), sign);
    Store(hn::NegMulAdd(b, s, hn::Mul(a, c)), x + i, n);
    Store(hn::MulAdd(a, s, hn::Mul(b, c)), x + half + i, n);
  });
}

// cos holds each value twice, sin twice with the first negated: y = x * cos + swap(x) * sin.
template <typename T>
HWY_INLINE void RotatePairs(T* x, const float* cos, const float* sin, int64_t channels) {
  ForVectors(channels, [=](int64_t i, int64_t n) HWY_ATTR {
    const V v = Load(x + i, n);
    Store(hn::MulAdd(hn::Reverse2(DF(), v), Load(sin + i), hn::Mul(v, Load(cos + i))), x + i, n);
  });
}

template <typename T>
void RopeLoop(const RopeArgs& args) {
  const RopeArgs a = args;
  const int64_t tokens = a.x.shape[0];
  TensorRef headsOf = a.x;  // one token: [..., D]
  headsOf.shape[0] = 1;
  const Rows<T> heads(headsOf);
  const Ids positions(a.positions);
  const int64_t work = std::max<int64_t>(1, heads.count() * 2 * a.half);
  parallelChunks(tokens, std::max<int64_t>(1, 16384 / work), [=](int64_t begin, int64_t end) HWY_ATTR {
    alignas(64) float cosPairs[kMaxRotated + kLanes] = {}, sinPairs[kMaxRotated + kLanes] = {};
    const float sign = a.inverse ? -1.0f : 1.0f;
    for (int64_t t = begin; t < end; ++t) {
      const float* cos = a.cos + positions[t] * a.cosStride;
      const float* sin = a.sin + positions[t] * a.sinStride;
      if (a.interleaved) {
        for (int64_t i = 0; i < a.half; ++i) {
          cosPairs[2 * i] = cosPairs[2 * i + 1] = cos[i];
          sinPairs[2 * i] = -sign * sin[i];
          sinPairs[2 * i + 1] = sign * sin[i];
        }
      }
      for (int64_t h = 0; h < heads.count(); ++h) {
        T* x = heads[h] + t * a.x.stride[0];
        if (a.interleaved) {
          RotatePairs(x, cosPairs, sinPairs, 2 * a.half);
        } else {
          RotateHalves(x, cos, sin, a.half, Set(sign));
        }
      }
    }
  });
}

void RopeKernel(const RopeArgs& a) { a.x.dtype == DType::F32 ? RopeLoop<float>(a) : RopeLoop<BF16>(a); }

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "cpu_backend.h"

namespace viaduct::cpu {

HWY_EXPORT(RopeKernel);

void CpuBackend::rope(Stream& s, InOut x, In cos, In sin, In positions, bool interleaved, bool inverse) {
  checkRope(x, cos, sin, positions);
  RopeArgs a;
  a.x = x, a.positions = positions, a.cos = cos.as<float>(), a.sin = sin.as<float>();
  a.cosStride = cos.stride[0], a.sinStride = sin.stride[0], a.half = cos.dim(1);
  a.interleaved = interleaved, a.inverse = inverse;
  const int64_t rows = cos.dim(0);
  s.enqueue("rope", [a, rows] {
    const Ids at(a.positions);
    for (int64_t t = 0; t < a.x.shape[0]; ++t) {
      VIADUCT_CHECK(at[t] >= 0 && at[t] < rows, "ERR_SHAPE", "rope",
                    "expected positions below the " + std::to_string(rows) + " rows of cos, got " +
                        std::to_string(at[t]) + " at token " + std::to_string(t) + ": build a longer table");
    }
    HWY_DYNAMIC_DISPATCH(RopeKernel)(a);
  });
}

}  // namespace viaduct::cpu
#endif  // HWY_ONCE
