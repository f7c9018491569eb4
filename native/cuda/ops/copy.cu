// fill and copy: tensors of any strides and dtypes. A copy is planned once (../../copy_plan.h), in packs where memory allows it;
// transpositions go through tiles of shared memory. Casts have the CPU's bits, NaN included.
#include "../../checks/ops.h"
#include "../../convert.h"
#include "../../copy_plan.h"
#include "../cuda_backend.h"
#include "../launch.cuh"
#include "../numbers.cuh"

namespace viaduct::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTile = 32;  // side of a tile of a transposition
constexpr int kTileRows = 8;

/// Offsets of the element with this index; dims are divided out from the last one.
__device__ __forceinline__ void offsetsOf(const CopyPlan& plan, int64_t index, int64_t* y, int64_t* x) {
  *y = *x = 0;
  if (index <= 0xffffffffll) {  // 32-bit divisions are several times as fast
    auto rest = static_cast<uint32_t>(index);
    for (int i = plan.ndim - 1; i > 0; --i) {
      const auto size = static_cast<uint32_t>(plan.shape[i]);
      const uint32_t k = rest % size;
      rest /= size;
      *y += k * plan.y[i];
      *x += k * plan.x[i];
    }
    *y += rest * plan.y[0];
    *x += rest * plan.x[0];
    return;
  }
  for (int i = plan.ndim - 1; i > 0; --i) {
    const int64_t k = index % plan.shape[i];
    index /= plan.shape[i];
    *y += k * plan.y[i];
    *x += k * plan.x[i];
  }
  *y += index * plan.y[0];
  *x += index * plan.x[0];
}

template <typename To, typename From>
__device__ __forceinline__ To castOne(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else {
    return Cast<To, From>::one(x);
  }
}

/// y[...] = x[...]; strides and shapes of the plan count packs of W.
template <int W, typename To, typename From>
__global__ void __launch_bounds__(kThreads)
    copyKernel(CopyPlan plan, Pack<To, W>* y, const Pack<From, W>* x, int64_t packs) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < packs; i += step) {
    int64_t yAt, xAt;
    offsetsOf(plan, i, &yAt, &xAt);
    const Pack<From, W> from = x[xAt];
    Pack<To, W> to;
#pragma unroll
    for (int k = 0; k < W; ++k) to.at[k] = castOne<To>(from.at[k]);
    y[yAt] = to;
  }
}

/// The last two dims of the plan transposed: x runs along the one before the last, y along the last. blockIdx.z and gridDim.z
/// go over the dims before them.
template <typename To, typename From>
__global__ void __launch_bounds__(kTile* kTileRows)
    transposeKernel(CopyPlan plan, To* y, const From* x, int64_t outer) {
  __shared__ To tile[kTile][kTile + 1];
  const int last = plan.ndim - 1;
  const int64_t rows = plan.shape[last - 1], columns = plan.shape[last];
  CopyPlan before = plan;
  before.ndim = last - 1;
  for (int64_t o = blockIdx.z; o < outer; o += gridDim.z) {
    int64_t yBase = 0, xBase = 0;
    if (before.ndim > 0) offsetsOf(before, o, &yBase, &xBase);
    for (int64_t column = static_cast<int64_t>(blockIdx.y) * kTile; column < columns;
         column += static_cast<int64_t>(gridDim.y) * kTile) {
      const int64_t row = static_cast<int64_t>(blockIdx.x) * kTile;
      for (int k = threadIdx.y; k < kTile; k += kTileRows) {
        const int64_t r = row + threadIdx.x, c = column + k;
        if (r < rows && c < columns) {
          tile[k][threadIdx.x] = castOne<To>(x[xBase + r * plan.x[last - 1] + c * plan.x[last]]);
        }
      }
      __syncthreads();
      for (int k = threadIdx.y; k < kTile; k += kTileRows) {
        const int64_t r = row + k, c = column + threadIdx.x;
        if (r < rows && c < columns) y[yBase + r * plan.y[last - 1] + c * plan.y[last]] = tile[threadIdx.x][k];
      }
      __syncthreads();
    }
  }
}

__device__ float loadFloat(DType dtype, const void* x, int64_t i) {
  switch (dtype) {
    case DType::F32:
      return static_cast<const float*>(x)[i];
    case DType::BF16:
      return toFloat(static_cast<const BF16*>(x)[i]);
    case DType::F16:
      return toFloat(static_cast<const F16*>(x)[i]);
    case DType::F64:
      return toFloat(static_cast<const double*>(x)[i]);
    case DType::F8_E4M3:
      return toFloat(static_cast<const F8E4M3*>(x)[i]);
    default:
      return toFloat(static_cast<const F8E5M2*>(x)[i]);
  }
}

__device__ void storeFloat(DType dtype, void* y, int64_t i, float value) {
  switch (dtype) {
    case DType::F32:
      static_cast<float*>(y)[i] = value;
      return;
    case DType::BF16:
      static_cast<BF16*>(y)[i] = fromFloat<BF16>(value);
      return;
    case DType::F16:
      static_cast<F16*>(y)[i] = fromFloat<F16>(value);
      return;
    case DType::F64:
      static_cast<double*>(y)[i] = value;
      return;
    case DType::F8_E4M3:
      static_cast<F8E4M3*>(y)[i] = fromFloat<F8E4M3>(value);
      return;
    default:
      static_cast<F8E5M2*>(y)[i] = fromFloat<F8E5M2>(value);
  }
}

__device__ int64_t loadWhole(DType dtype, const void* x, int64_t i) {
  switch (dtype) {
    case DType::I64:
    case DType::U64:
      return static_cast<const int64_t*>(x)[i];
    case DType::I32:
      return static_cast<const int32_t*>(x)[i];
    case DType::U32:
      return static_cast<const uint32_t*>(x)[i];
    case DType::I16:
      return static_cast<const int16_t*>(x)[i];
    case DType::U16:
      return static_cast<const uint16_t*>(x)[i];
    case DType::I8:
      return static_cast<const int8_t*>(x)[i];
    case DType::BOOL:
      return static_cast<const uint8_t*>(x)[i] != 0;
    default:
      return static_cast<const uint8_t*>(x)[i];
  }
}

__device__ void storeWhole(DType dtype, void* y, int64_t i, int64_t value) {
  switch (dtype) {
    case DType::I64:
    case DType::U64:
      static_cast<int64_t*>(y)[i] = value;
      return;
    case DType::I32:
    case DType::U32:
      static_cast<int32_t*>(y)[i] = static_cast<int32_t>(value);
      return;
    case DType::I16:
    case DType::U16:
      static_cast<int16_t*>(y)[i] = static_cast<int16_t>(value);
      return;
    case DType::BOOL:
      static_cast<uint8_t*>(y)[i] = value != 0;
      return;
    default:
      static_cast<int8_t*>(y)[i] = static_cast<int8_t>(value);
  }
}

/// Any cast, dtypes by value: for pairs that no model's step needs.
__global__ void __launch_bounds__(kThreads)
    anyCastKernel(CopyPlan plan, DType yDtype, void* y, DType xDtype, const void* x, bool floats, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    int64_t yAt, xAt;
    offsetsOf(plan, i, &yAt, &xAt);
    if (floats) {
      storeFloat(yDtype, y, yAt, loadFloat(xDtype, x, xAt));
    } else {
      storeWhole(yDtype, y, yAt, loadWhole(xDtype, x, xAt));
    }
  }
}

template <int W, typename T>
__global__ void __launch_bounds__(kThreads) fillKernel(CopyPlan plan, Pack<T, W>* y, Pack<T, W> value, int64_t packs) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < packs; i += step) {
    int64_t yAt, xAt;
    offsetsOf(plan, i, &yAt, &xAt);
    y[yAt] = value;
  }
}

int64_t elementsOf(const CopyPlan& plan) {
  int64_t n = 1;
  for (int i = 0; i < plan.ndim; ++i) n *= plan.shape[i];
  return n;
}

/// The plan in packs of w elements, or false where it does not come out even.
bool inPacks(const CopyPlan& plan, int w, bool xToo, CopyPlan* packs) {
  const int last = plan.ndim - 1;
  if (plan.y[last] != 1 || (xToo && plan.x[last] != 1) || plan.shape[last] % w != 0) return false;
  *packs = plan;
  packs->shape[last] /= w;
  for (int i = 0; i < last; ++i) {
    if (plan.y[i] % w != 0 || (xToo && plan.x[i] % w != 0)) return false;
    packs->y[i] /= w;
    packs->x[i] /= w;
  }
  return true;
}

template <typename To, typename From>
void startCopy(const Launch& on, const CopyPlan& plan, To* y, const From* x) {
  constexpr int kPack = kPackOf<To, From>;
  CopyPlan packs;
  if (packable(y, x) && inPacks(plan, kPack, true, &packs)) {
    const int64_t n = elementsOf(packs);
    on(copyKernel<kPack, To, From>, on.blocksFor(n, kThreads), kThreads, packs, reinterpret_cast<Pack<To, kPack>*>(y),
       reinterpret_cast<const Pack<From, kPack>*>(x), n);
    return;
  }
  const int last = plan.ndim - 1;
  for (int across = 0; plan.x[last] != 1 && across < last; ++across) {
    if (plan.x[across] != 1) continue;
    CopyPlan swapped = plan;
    std::swap(swapped.shape[across], swapped.shape[last - 1]);
    std::swap(swapped.y[across], swapped.y[last - 1]);
    std::swap(swapped.x[across], swapped.x[last - 1]);
    const int64_t rows = swapped.shape[last - 1], columns = swapped.shape[last];
    const int64_t outer = elementsOf(plan) / rows / columns;
    const dim3 grid(static_cast<unsigned>((rows + kTile - 1) / kTile),
                    static_cast<unsigned>(std::min<int64_t>((columns + kTile - 1) / kTile, 65535)),
                    static_cast<unsigned>(std::min<int64_t>(outer, 65535)));
    on(transposeKernel<To, From>, grid, dim3(kTile, kTileRows), swapped, y, x, outer);
    return;
  }
  const int64_t n = elementsOf(plan);
  on(copyKernel<1, To, From>, on.blocksFor(n, kThreads), kThreads, plan, reinterpret_cast<Pack<To, 1>*>(y),
     reinterpret_cast<const Pack<From, 1>*>(x), n);
}

template <typename T>
void startFill(const Launch& on, const CopyPlan& plan, T* y, T value) {
  constexpr int kPack = kPackOf<T>;
  CopyPlan packs;
  if (packable(y) && inPacks(plan, kPack, false, &packs)) {
    Pack<T, kPack> values;
    for (T& v : values.at) v = value;
    const int64_t n = elementsOf(packs);
    on(fillKernel<kPack, T>, on.blocksFor(n, kThreads), kThreads, packs, reinterpret_cast<Pack<T, kPack>*>(y), values,
       n);
    return;
  }
  const int64_t n = elementsOf(plan);
  on(fillKernel<1, T>, on.blocksFor(n, kThreads), kThreads, plan, reinterpret_cast<Pack<T, 1>*>(y), Pack<T, 1>{{value}},
     n);
}

/// Calls f with an unsigned number of this many bytes.
template <typename F>
void dispatchBytes(size_t bytes, F&& f) {
  if (bytes == 1) return f(uint8_t{});
  if (bytes == 2) return f(uint16_t{});
  if (bytes == 4) return f(uint32_t{});
  f(uint64_t{});
}

}  // namespace

void CudaBackend::fill(Stream& s, Out y, double value) {
  if (y.numel() == 0) return;
  const Element element = elementOf(y.dtype, value);
  const Launch on(s);
  s.enqueue("fill", [=] {
    const int64_t zeros[kMaxDims] = {};
    const CopyPlan plan = planCopy(y, zeros);
    dispatchBytes(dtypeBytes(y.dtype), [&](auto zero) {
      using T = decltype(zero);
      T bits;
      std::memcpy(&bits, element.bytes, sizeof bits);
      startFill(on, plan, y.as<T>(), bits);
    });
  });
}

void CudaBackend::copy(Stream& s, Out y, In x) {
  checkCopy(y, x);
  if (y.numel() == 0) return;
  const Launch on(s);
  s.enqueue("copy", [=] {
    const CopyPlan plan = planCopy(y, x.stride);
    if (y.dtype == x.dtype) {
      return dispatchBytes(dtypeBytes(y.dtype), [&](auto zero) {
        using T = decltype(zero);
        startCopy(on, plan, y.as<T>(), x.as<T>());
      });
    }
    const auto is = [&](DType to, DType from) { return y.dtype == to && x.dtype == from; };
    if (is(DType::F32, DType::BF16)) return startCopy(on, plan, y.as<float>(), x.as<BF16>());
    if (is(DType::BF16, DType::F32)) return startCopy(on, plan, y.as<BF16>(), x.as<float>());
    if (is(DType::F32, DType::F16)) return startCopy(on, plan, y.as<float>(), x.as<F16>());
    if (is(DType::F16, DType::F32)) return startCopy(on, plan, y.as<F16>(), x.as<float>());
    const int64_t n = y.numel();
    on(anyCastKernel, on.blocksFor(n, kThreads), kThreads, plan, y.dtype, y.data, x.dtype, x.data,
       convertible(y.dtype, DType::F32), n);
  });
}

namespace {
const Support support{{"fill", Takes::AnyType}, {"copy", Takes::AnyType}};
}

}  // namespace viaduct::cuda
