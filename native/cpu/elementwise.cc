// Elementwise arithmetic and plain sums over F32 and BF16: add, mul, accumulate, scale, addBias, sum, sumRows.
// Filling and copying are in copy.cc. Every result is computed in F32 and rounded once.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/elementwise.cc"
#include "column_sum.h"
#include "vectors.h"

#ifndef VIADUCT_CPU_ELEMENTWISE
#define VIADUCT_CPU_ELEMENTWISE
namespace viaduct::cpu {
enum class Binary { Add, Mul };
constexpr int64_t kGrain = 65536;     // elements of one task of a memory-bound loop
constexpr int64_t kSumGrain = 65536;  // elements of one partial sum
}  // namespace viaduct::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {
namespace {

template <Binary kOp, typename T, typename U>
void BinaryLoop(T* y, const T* a, const U* b, int64_t size) {
  parallelChunks(size, kGrain, [=](int64_t begin, int64_t end) HWY_ATTR {
    ForVectors(end - begin, [=](int64_t i, int64_t n) HWY_ATTR {
      const V va = Load(a + begin + i, n), vb = Load(b + begin + i, n);
      Store(kOp == Binary::Add ? hn::Add(va, vb) : hn::Mul(va, vb), y + begin + i, n);
    });
  });
}

template <Binary kOp>
void BinaryDtype(DType dtype, void* y, const void* a, const void* b, int64_t size) {
  if (dtype == DType::F32) {
    BinaryLoop<kOp>(static_cast<float*>(y), static_cast<const float*>(a), static_cast<const float*>(b), size);
  } else {
    BinaryLoop<kOp>(static_cast<BF16*>(y), static_cast<const BF16*>(a), static_cast<const BF16*>(b), size);
  }
}

void AddKernel(DType dtype, void* y, const void* a, const void* b, int64_t size) {
  BinaryDtype<Binary::Add>(dtype, y, a, b, size);
}
void MulKernel(DType dtype, void* y, const void* a, const void* b, int64_t size) {
  BinaryDtype<Binary::Mul>(dtype, y, a, b, size);
}

void AccumulateKernel(DType dtype, float* acc, const void* x, int64_t size) {
  if (dtype == DType::F32) {
    BinaryLoop<Binary::Add>(acc, acc, static_cast<const float*>(x), size);
  } else {
    BinaryLoop<Binary::Add>(acc, acc, static_cast<const BF16*>(x), size);
  }
}

template <typename T>
void ScaleLoop(T* x, float factor, int64_t size) {
  parallelChunks(size, kGrain, [=](int64_t begin, int64_t end) HWY_ATTR {
    const V f = Set(factor);
    ForVectors(end - begin,
               [=](int64_t i, int64_t n) HWY_ATTR { Store(hn::Mul(Load(x + begin + i, n), f), x + begin + i, n); });
  });
}
void ScaleKernel(DType dtype, void* x, float factor, int64_t size) {
  if (dtype == DType::F32) return ScaleLoop(static_cast<float*>(x), factor, size);
  ScaleLoop(static_cast<BF16*>(x), factor, size);
}

// With dy the gradient of x, else x itself between the bounds. A comparison with a NaN is false: it stays.
template <typename T>
void ClampLoop(T* y, const T* x, const T* dy, float low, float high, int64_t size) {
  parallelChunks(size, kGrain, [=](int64_t begin, int64_t end) HWY_ATTR {
    const V least = Set(low), most = Set(high);
    ForVectors(end - begin, [=](int64_t i, int64_t n) HWY_ATTR {
      const V v = Load(x + begin + i, n);
      const auto under = hn::Lt(v, least), over = hn::Gt(v, most);
      const V kept = dy == nullptr ? hn::IfThenElse(under, least, hn::IfThenElse(over, most, v))
                                   : hn::IfThenZeroElse(hn::Or(under, over), Load(dy + begin + i, n));
      Store(kept, y + begin + i, n);
    });
  });
}
void ClampKernel(DType dtype, void* y, const void* x, const void* dy, float low, float high, int64_t size) {
  if (dtype == DType::F32) {
    ClampLoop(static_cast<float*>(y), static_cast<const float*>(x), static_cast<const float*>(dy), low, high, size);
  } else {
    ClampLoop(static_cast<BF16*>(y), static_cast<const BF16*>(x), static_cast<const BF16*>(dy), low, high, size);
  }
}

template <typename T>
void AddBiasLoop(T* y, const T* x, const T* bias, int64_t rows, int64_t columns) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns));
  parallelChunks(rows, grain, [=](int64_t begin, int64_t end) HWY_ATTR {
    for (int64_t t = begin; t < end; ++t) {
      T* yRow = y + t * columns;
      const T* xRow = x + t * columns;
      ForVectors(columns, [=](int64_t i, int64_t n)
                              HWY_ATTR { Store(hn::Add(Load(xRow + i, n), Load(bias + i, n)), yRow + i, n); });
    }
  });
}
void AddBiasKernel(DType dtype, void* y, const void* x, const void* bias, int64_t rows, int64_t columns) {
  if (dtype == DType::F32) {
    AddBiasLoop(static_cast<float*>(y), static_cast<const float*>(x), static_cast<const float*>(bias), rows, columns);
  } else {
    AddBiasLoop(static_cast<BF16*>(y), static_cast<const BF16*>(x), static_cast<const BF16*>(bias), rows, columns);
  }
}

template <typename T>
double SumRange(const T* x, int64_t size) {
  VD low = hn::Zero(DD()), high = hn::Zero(DD());
  for (int64_t i = 0; i < size; i += kLanes) {
    const V v = Load(x + i, HWY_MIN(kLanes, size - i));
    low = hn::Add(low, LowerF64(v));
    high = hn::Add(high, UpperF64(v));
  }
  return SumF64Lanes(hn::Add(low, high));
}
void SumKernel(DType dtype, const void* x, double* partial, int64_t size) {
  parallelChunks(size, kSumGrain, [=](int64_t begin, int64_t end) HWY_ATTR {
    partial[begin / kSumGrain] = dtype == DType::F32 ? SumRange(static_cast<const float*>(x) + begin, end - begin)
                                                     : SumRange(static_cast<const BF16*>(x) + begin, end - begin);
  });
}

template <typename T>
void SumRowsLoop(float* acc, const T* x, int64_t stride, int64_t rows, int64_t columns) {
  float* const outputs[1] = {acc};
  SumColumns<1>(outputs, rows, columns,
                [=](int, int64_t t, int64_t c, int64_t n) HWY_ATTR { return Load(x + t * stride + c, n); });
}
void SumRowsKernel(DType dtype, float* acc, const void* x, int64_t stride, int64_t rows, int64_t columns) {
  if (dtype == DType::F32) return SumRowsLoop(acc, static_cast<const float*>(x), stride, rows, columns);
  SumRowsLoop(acc, static_cast<const BF16*>(x), stride, rows, columns);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "../checks/ops.h"
#include "cpu_backend.h"

namespace viaduct::cpu {

HWY_EXPORT(AddKernel);
HWY_EXPORT(MulKernel);
HWY_EXPORT(AccumulateKernel);
HWY_EXPORT(ScaleKernel);
HWY_EXPORT(ClampKernel);
HWY_EXPORT(AddBiasKernel);
HWY_EXPORT(SumKernel);
HWY_EXPORT(SumRowsKernel);

void CpuBackend::add(Stream& s, Out y, In a, In b) {
  checkBinary("add", y, a, b);
  s.enqueue("add", [=] { HWY_DYNAMIC_DISPATCH(AddKernel)(a.dtype, y.data, a.data, b.data, a.numel()); });
}

void CpuBackend::mul(Stream& s, Out y, In a, In b) {
  checkBinary("mul", y, a, b);
  s.enqueue("mul", [=] { HWY_DYNAMIC_DISPATCH(MulKernel)(a.dtype, y.data, a.data, b.data, a.numel()); });
}

void CpuBackend::accumulate(Stream& s, InOut acc, In x) {
  checkAccumulate(acc, x);
  s.enqueue("accumulate", [=] { HWY_DYNAMIC_DISPATCH(AccumulateKernel)(x.dtype, acc.as<float>(), x.data, x.numel()); });
}

void CpuBackend::scale(Stream& s, InOut x, In factor) {
  checkScale(x, factor);
  s.enqueue("scale", [=] { HWY_DYNAMIC_DISPATCH(ScaleKernel)(x.dtype, x.data, *factor.as<float>(), x.numel()); });
}

void CpuBackend::clamp(Stream& s, Out y, In x, double low, double high) {
  checkUnary("clamp", y, x);
  s.enqueue("clamp", [=] {
    HWY_DYNAMIC_DISPATCH(ClampKernel)
    (x.dtype, y.data, x.data, nullptr, static_cast<float>(low), static_cast<float>(high), x.numel());
  });
}

void CpuBackend::clampBackward(Stream& s, Out dx, In dy, In x, double low, double high) {
  checkBinary("clampBackward", dx, dy, x);
  s.enqueue("clampBackward", [=] {
    HWY_DYNAMIC_DISPATCH(ClampKernel)
    (x.dtype, dx.data, x.data, dy.data, static_cast<float>(low), static_cast<float>(high), x.numel());
  });
}

void CpuBackend::sum(Stream& s, Out y, In x) {
  checkSum(y, x);
  s.enqueue("sum", [=] {
    const int64_t size = x.numel();
    const int64_t parts = (size + kSumGrain - 1) / kSumGrain;
    double* partial = scratch<double>(static_cast<size_t>(parts));
    HWY_DYNAMIC_DISPATCH(SumKernel)(x.dtype, x.data, partial, size);
    double total = 0;
    for (int64_t i = 0; i < parts; ++i) total += partial[i];
    *y.as<float>() = static_cast<float>(total);
  });
}

void CpuBackend::sumRows(Stream& s, InOut acc, In x) {
  checkSumRows(acc, x);
  s.enqueue("sumRows", [=] {
    HWY_DYNAMIC_DISPATCH(SumRowsKernel)(x.dtype, acc.as<float>(), x.data, x.stride[0], x.dim(0), x.dim(1));
  });
}

void CpuBackend::addBias(Stream& s, Out y, In x, In bias) {
  checkAddBias(y, x, bias);
  s.enqueue("addBias", [=] {
    const int64_t columns = x.dim(-1);
    if (x.numel() == 0) return;
    HWY_DYNAMIC_DISPATCH(AddBiasKernel)(x.dtype, y.data, x.data, bias.data, x.numel() / columns, columns);
  });
}

}  // namespace viaduct::cpu
#endif  // HWY_ONCE
