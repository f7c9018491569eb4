// Reductions over blocks of several ranks: vectors for F32 and BF16, plain loops for the others. One pass over all sources,
// so that an element is rounded once and its sum has the order of the ranks whatever the algorithm that moved the bytes.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/reduce.cc"
#include "vectors.h"

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {
namespace {

enum : int { kSum = 0, kMax = 1, kMin = 2 };

template <int kOp>
HWY_INLINE V Join(V a, V b) {
  if (kOp == kSum) return hn::Add(a, b);
  const V joined = kOp == kMax ? hn::IfThenElse(hn::Gt(a, b), a, b) : hn::IfThenElse(hn::Lt(a, b), a, b);
  return hn::IfThenElse(hn::IsNaN(a), a, joined);
}

template <int kOp, typename T>
void VectorLoop(T* out, const void* const* sources, int n, int64_t count) {
  ForVectors(count, [=](int64_t i, int64_t lanes) HWY_ATTR {
    V acc = Load(static_cast<const T*>(sources[0]) + i, lanes);
    for (int s = 1; s < n; ++s) acc = Join<kOp>(acc, Load(static_cast<const T*>(sources[s]) + i, lanes));
    Store(acc, out + i, lanes);
  });
}

template <typename T>
void VectorOp(T* out, const void* const* sources, int n, int64_t count, int op) {
  if (op == kSum) return VectorLoop<kSum>(out, sources, n, count);
  if (op == kMax) return VectorLoop<kMax>(out, sources, n, count);
  VectorLoop<kMin>(out, sources, n, count);
}

void ReduceFloats(float* out, const void* const* sources, int n, int64_t count, int op) {
  VectorOp(out, sources, n, count, op);
}
void ReduceBrainFloats(BF16* out, const void* const* sources, int n, int64_t count, int op) {
  VectorOp(out, sources, n, count, op);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <type_traits>

#include "../errors.h"
#include "reduce.h"

namespace viaduct::cpu {

HWY_EXPORT(ReduceFloats);
HWY_EXPORT(ReduceBrainFloats);

namespace {

template <typename T>
T join(T a, T b, ReduceOp op) {
  if (op == ReduceOp::Sum) {
    if constexpr (std::is_integral_v<T>) {
      using U = std::make_unsigned_t<T>;  // wraps around instead of overflowing
      return static_cast<T>(static_cast<U>(static_cast<U>(a) + static_cast<U>(b)));
    } else {
      return a + b;
    }
  }
  if constexpr (std::is_floating_point_v<T>) {
    if (a != a) return a;
  }
  if (op == ReduceOp::Max) return a > b ? a : b;
  return a < b ? a : b;
}

template <typename T>
void plainLoop(void* out, const void* const* sources, int n, int64_t count, ReduceOp op) {
  for (int64_t i = 0; i < count; ++i) {
    T acc = static_cast<const T*>(sources[0])[i];
    for (int s = 1; s < n; ++s) acc = join(acc, static_cast<const T*>(sources[s])[i], op);
    static_cast<T*>(out)[i] = acc;
  }
}

void halfLoop(void* out, const void* const* sources, int n, int64_t count, ReduceOp op) {
  for (int64_t i = 0; i < count; ++i) {
    float acc = toFloat(static_cast<const F16*>(sources[0])[i]);
    for (int s = 1; s < n; ++s) acc = join(acc, toFloat(static_cast<const F16*>(sources[s])[i]), op);
    static_cast<F16*>(out)[i] = fromFloat<F16>(acc);
  }
}

}  // namespace

bool reducible(DType dtype) { return dtype != DType::F8_E4M3 && dtype != DType::F8_E5M2; }

void reduceSources(void* out, const void* const* sources, int n, int64_t count, DType dtype, ReduceOp op) {
  switch (dtype) {
    case DType::F32:
      HWY_DYNAMIC_DISPATCH(ReduceFloats)(static_cast<float*>(out), sources, n, count, static_cast<int>(op));
      return;
    case DType::BF16:
      HWY_DYNAMIC_DISPATCH(ReduceBrainFloats)(static_cast<BF16*>(out), sources, n, count, static_cast<int>(op));
      return;
    case DType::F16:
      return halfLoop(out, sources, n, count, op);
    case DType::F64:
      return plainLoop<double>(out, sources, n, count, op);
    case DType::I64:
      return plainLoop<int64_t>(out, sources, n, count, op);
    case DType::I32:
      return plainLoop<int32_t>(out, sources, n, count, op);
    case DType::I16:
      return plainLoop<int16_t>(out, sources, n, count, op);
    case DType::I8:
      return plainLoop<int8_t>(out, sources, n, count, op);
    case DType::U8:
      return plainLoop<uint8_t>(out, sources, n, count, op);
    case DType::U16:
      return plainLoop<uint16_t>(out, sources, n, count, op);
    case DType::U32:
      return plainLoop<uint32_t>(out, sources, n, count, op);
    case DType::U64:
      return plainLoop<uint64_t>(out, sources, n, count, op);
    case DType::BOOL:
      return plainLoop<uint8_t>(out, sources, n, count, op == ReduceOp::Min ? ReduceOp::Min : ReduceOp::Max);
    case DType::F8_E4M3:
    case DType::F8_E5M2:
      break;
  }
  throw Error("ERR_DTYPE", "reduce",
              std::string("expected a dtype that can be summed, got ") + dtypeName(dtype) + ": cast it first");
}

}  // namespace viaduct::cpu
#endif  // HWY_ONCE
