// Rows on their way to experts and back: copied, weighed and added up in F32, in the order of a token's choices.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "native/cpu/expert_rows.cc"
#include "vectors.h"

#ifndef VIADUCT_CPU_EXPERT_ROWS
#define VIADUCT_CPU_EXPERT_ROWS
namespace viaduct::cpu {

/// Tokens of one task, of rows of so many elements each.
inline int64_t tokenGrain(int64_t elements) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements)); }

}  // namespace viaduct::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace viaduct::cpu {
namespace HWY_NAMESPACE {
namespace {

template <typename T>
void SpreadLoop(const TensorRef& y, const TensorRef& x, const TensorRef& source, const TensorRef& weights, int64_t K) {
  const int64_t width = y.shape[1], tokens = x.shape[0];
  parallelChunks(
      y.shape[0], tokenGrain(width),
      [=](int64_t begin, int64_t end) HWY_ATTR {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t from = source.as<int32_t>()[i];
          T* out = y.as<T>() + i * y.stride[0];
          if (from < 0 || from / K >= tokens) {
            std::fill(out, out + width, T{});
            continue;
          }
          const T* in = x.as<T>() + from / K * x.stride[0];
          if (!weights.present()) {
            std::copy(in, in + width, out);
            continue;
          }
          const V w = Set(weights.as<float>()[from]);
          ForVectors(width, [=](int64_t c, int64_t n) HWY_ATTR { Store(hn::Mul(w, Load(in + c, n)), out + c, n); });
        }
      },
      y.shape[0] * width);
}

template <typename T>
void CombineLoop(const TensorRef& y, const TensorRef& x, const TensorRef& place, const TensorRef& weights,
                 int64_t first) {
  const int64_t width = y.shape[1], K = place.shape[1], rows = x.shape[0];
  parallelChunks(
      y.shape[0], tokenGrain(width * K),
      [=](int64_t begin, int64_t end) HWY_ATTR {
        for (int64_t t = begin; t < end; ++t) {
          const int32_t* at = place.as<int32_t>() + t * K;
          const float* w = weights.present() ? weights.as<float>() + t * K : nullptr;
          T* out = y.as<T>() + t * y.stride[0];
          ForVectors(width, [=](int64_t c, int64_t n) HWY_ATTR {
            V sum = Zero();
            for (int64_t k = 0; k < K; ++k) {
              const int64_t row = at[k] - first;
              if (row < 0 || row >= rows) continue;
              const V v = Load(x.as<T>() + row * x.stride[0] + c, n);
              sum = w != nullptr ? hn::MulAdd(Set(w[k]), v, sum) : hn::Add(v, sum);
            }
            Store(sum, out + c, n);
          });
        }
      },
      y.shape[0] * width * K);
}

template <typename T>
void CombineWeightsLoop(const TensorRef& dWeights, const TensorRef& dy, const TensorRef& x, const TensorRef& place,
                        int64_t first) {
  const int64_t width = x.shape[1], K = place.shape[1], rows = x.shape[0];
  parallelChunks(
      dy.shape[0], tokenGrain(width * K),
      [=](int64_t begin, int64_t end) HWY_ATTR {
        for (int64_t i = begin * K; i < end * K; ++i) {
          const int64_t row = place.as<int32_t>()[i] - first;
          double dot = 0;
          if (row >= 0 && row < rows) {
            const T *a = dy.as<T>() + i / K * dy.stride[0], *b = x.as<T>() + row * x.stride[0];
            dot = SumVectors(width,
                             [=](int64_t c, int64_t n) HWY_ATTR { return hn::Mul(Load(a + c, n), Load(b + c, n)); });
          }
          dWeights.as<float>()[i] = static_cast<float>(dot);
        }
      },
      dy.shape[0] * width * K);
}

void SpreadKernel(const TensorRef& y, const TensorRef& x, const TensorRef& source, const TensorRef& weights,
                  int64_t K) {
  x.dtype == DType::F32 ? SpreadLoop<float>(y, x, source, weights, K) : SpreadLoop<BF16>(y, x, source, weights, K);
}
void CombineKernel(const TensorRef& y, const TensorRef& x, const TensorRef& place, const TensorRef& weights,
                   int64_t first) {
  x.dtype == DType::F32 ? CombineLoop<float>(y, x, place, weights, first)
                        : CombineLoop<BF16>(y, x, place, weights, first);
}
void CombineWeightsKernel(const TensorRef& dWeights, const TensorRef& dy, const TensorRef& x, const TensorRef& place,
                          int64_t first) {
  x.dtype == DType::F32 ? CombineWeightsLoop<float>(dWeights, dy, x, place, first)
                        : CombineWeightsLoop<BF16>(dWeights, dy, x, place, first);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace viaduct::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "../checks/ops.h"
#include "cpu_backend.h"

namespace viaduct::cpu {

HWY_EXPORT(SpreadKernel);
HWY_EXPORT(CombineKernel);
HWY_EXPORT(CombineWeightsKernel);

void CpuBackend::spreadRows(Stream& s, Out y, In x, In source, OptIn weights, int64_t K) {
  checkSpreadRows(y, x, source, weights, K);
  s.enqueue("spreadRows", [=] { HWY_DYNAMIC_DISPATCH(SpreadKernel)(y, x, source, weights, K); });
}

void CpuBackend::combineRows(Stream& s, Out y, In x, In place, OptIn weights, int64_t first) {
  checkCombineRows(y, x, place, weights);
  s.enqueue("combineRows", [=] { HWY_DYNAMIC_DISPATCH(CombineKernel)(y, x, place, weights, first); });
}

void CpuBackend::combineRowsBackwardWeights(Stream& s, Out dWeights, In dy, In x, In place, int64_t first) {
  checkCombineRowsBackwardWeights(dWeights, dy, x, place);
  s.enqueue("combineRowsBackwardWeights", [=] {
    HWY_DYNAMIC_DISPATCH(CombineWeightsKernel)(dWeights, dy, x, place, first);
  });
}

}  // namespace viaduct::cpu
#endif  // HWY_ONCE
