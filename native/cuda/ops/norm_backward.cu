// RMSNorm and LayerNorm, backward: the gradient of the input row by row (norm_rows.cuh), that of the weight column by column
// (column_sum.cuh).
#include "../column_sum.cuh"
#include "../norm_rows.cuh"

#include "../../checks/ops.h"
#include "../cuda_backend.h"

namespace viaduct::cuda {

namespace {

// With g = dy * w: dx = rstd * (g - x * rstd^2 * mean(g * x)).
template <typename T, typename Weight>
struct RmsBackward {
  RowsOf<T> dx;
  RowsOf<const T> dy, x, dResidual;
  const Weight* w;
  const float* rstd;
  float offset;

  template <int W, int kPer>
  __device__ void row(int64_t t, int64_t width) const {
    const T *gradient = dy[t], *in = x[t], *more = dResidual.data == nullptr ? nullptr : dResidual[t];
    T* out = dx[t];
    const auto load = [&](int64_t i, float(&v)[2][W]) {
      float weight[W];
      loadPack(gradient + i, v[0]);
      loadPack(in + i, v[1]);
      loadPack(w + i, weight);
#pragma unroll
      for (int k = 0; k < W; ++k) v[0][k] *= weight[k] + offset;
    };
    KeptRow<W, kPer, 2> kept;
    float sum = 0;
    kept.fill(width, [&](int64_t i, float(&v)[2][W]) {
      load(i, v);
#pragma unroll
      for (int k = 0; k < W; ++k) sum += v[0][k] * v[1][k];
    });
    const double dot = rowSum<kPer>(static_cast<double>(sum)), r = rstd[t];
    const float scale = rstd[t], back = static_cast<float>(r * r * r * dot / static_cast<double>(width));
    kept.each(width, load, [&](int64_t i, float(&v)[2][W]) {
      float passing[W] = {};
      if (more != nullptr) loadPack(more + i, passing);
#pragma unroll
      for (int k = 0; k < W; ++k) v[0][k] = v[0][k] * scale - v[1][k] * back + passing[k];
      storePack(out + i, v[0]);
    });
  }
};

// With g = dy * w and n = (x - mean) * rstd: dx = rstd * (g - mean(g) - n * mean(g * n)).
template <typename T, typename Weight>
struct LayerBackward {
  RowsOf<T> dx;
  RowsOf<const T> dy, x;
  const Weight* w;
  const float *mean, *rstd;
  float offset;

  template <int W, int kPer>
  __device__ void row(int64_t t, int64_t width) const {
    const T *gradient = dy[t], *in = x[t];
    T* out = dx[t];
    const float m = mean[t], scale = rstd[t];
    const auto load = [&](int64_t i, float(&v)[2][W]) {
      float weight[W];
      loadPack(gradient + i, v[0]);
      loadPack(in + i, v[1]);
      loadPack(w + i, weight);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        v[0][k] *= weight[k] + offset;
        v[1][k] = (v[1][k] - m) * scale;
      }
    };
    KeptRow<W, kPer, 2> kept;
    float sum = 0, product = 0;
    kept.fill(width, [&](int64_t i, float(&v)[2][W]) {
      load(i, v);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        sum += v[0][k];
        product += v[0][k] * v[1][k];
      }
    });
    const double inverse = 1.0 / static_cast<double>(width);
    const float meanG = static_cast<float>(rowSum<kPer>(static_cast<double>(sum)) * inverse);
    const float meanDot = static_cast<float>(rowSum<kPer>(static_cast<double>(product)) * inverse);
    kept.each(width, load, [&](int64_t i, float(&v)[2][W]) {
#pragma unroll
      for (int k = 0; k < W; ++k) v[0][k] = scale * (v[0][k] - meanG - v[1][k] * meanDot);
      storePack(out + i, v[0]);
    });
  }
};

/// dy * x * rstd.
template <int W, typename T>
struct RmsWeight {
  RowsOf<const T> dy, x;
  const float* rstd;
  __device__ void operator()(int64_t t, int64_t column, float (&v)[1][W]) const {
    float h[W];
    loadPack(dy[t] + column, v[0]);
    loadPack(x[t] + column, h);
#pragma unroll
    for (int k = 0; k < W; ++k) v[0][k] *= h[k] * rstd[t];
  }
};

/// dy * (x - mean) * rstd, and dy.
template <int W, typename T>
struct LayerWeight {
  RowsOf<const T> dy, x;
  const float *mean, *rstd;
  __device__ void operator()(int64_t t, int64_t column, float (&v)[2][W]) const {
    float h[W];
    loadPack(dy[t] + column, v[1]);
    loadPack(x[t] + column, h);
#pragma unroll
    for (int k = 0; k < W; ++k) v[0][k] = v[1][k] * ((h[k] - mean[t]) * rstd[t]);
  }
};

/// Whether the packs of a row's sums may be read.
template <typename T>
bool columnPacks(const TensorRef& dy, const TensorRef& x) {
  return RowsOf<const T>(dy).packs(kPackOf<T>) && RowsOf<const T>(x).packs(kPackOf<T>) && x.dim(-1) % kPackOf<T> == 0;
}

}  // namespace

void CudaBackend::rmsNormBackwardInput(Stream& s, Out dx, In dy, In x, In w, In rstd, OptIn dResidual,
                                       bool zeroCentered) {
  checkRmsNormBackwardInput(dx, dy, x, w, rstd, dResidual);
  const Launch on(s);
  s.enqueue("rmsNormBackwardInput", [=] {
    dispatchNorm(x.dtype, w.dtype, [&](auto zero, auto weight) {
      using T = decltype(zero);
      using Weight = decltype(weight);
      const RmsBackward<T, Weight> work{
          RowsOf<T>(dx),        RowsOf<const T>(dy),    RowsOf<const T>(x),        RowsOf<const T>(dResidual),
          w.as<const Weight>(), rstd.as<const float>(), zeroCentered ? 1.0f : 0.0f};
      const bool packs = work.dx.packs(kPackOf<T>) && work.dy.packs(kPackOf<T>) && work.x.packs(kPackOf<T>) &&
                         work.dResidual.packs(kPackOf<T>) && packable(work.w);
      startRows<T>(on, work, x, packs);
    });
  });
}

void CudaBackend::rmsNormBackwardWeight(Stream& s, InOut dw, In dy, In x, In rstd) {
  checkRmsNormBackwardWeight(dw, dy, x, rstd);
  const int64_t width = x.dim(-1), rows = x.numel() / width;
  if (rows == 0) return;
  const Scratch scratch(*this, s, columnSumBytes<1>(rows, width));
  const Launch on(s);
  s.enqueue("rmsNormBackwardWeight", [=, parts = scratch.as<float>()] {
    const ColumnSums<1> sums{{dw.as<float>()}};
    dispatchFloat(x.dtype, [&](auto zero) {
      using T = decltype(zero);
      constexpr int kPack = kPackOf<T>;
      const RowsOf<const T> gradient(dy), in(x);
      if (columnPacks<T>(dy, x)) {
        startColumnSums<kPack>(on, sums, parts, RmsWeight<kPack, T>{gradient, in, rstd.as<const float>()}, rows, width);
      } else {
        startColumnSums<1>(on, sums, parts, RmsWeight<1, T>{gradient, in, rstd.as<const float>()}, rows, width);
      }
    });
  });
}

void CudaBackend::layerNormBackwardInput(Stream& s, Out dx, In dy, In x, In w, In mean, In rstd, bool zeroCentered) {
  checkLayerNormBackwardInput(dx, dy, x, w, mean, rstd);
  const Launch on(s);
  s.enqueue("layerNormBackwardInput", [=] {
    dispatchNorm(x.dtype, w.dtype, [&](auto zero, auto weight) {
      using T = decltype(zero);
      using Weight = decltype(weight);
      const LayerBackward<T, Weight> work{
          RowsOf<T>(dx),          RowsOf<const T>(dy),    RowsOf<const T>(x),        w.as<const Weight>(),
          mean.as<const float>(), rstd.as<const float>(), zeroCentered ? 1.0f : 0.0f};
      const bool packs =
          work.dx.packs(kPackOf<T>) && work.dy.packs(kPackOf<T>) && work.x.packs(kPackOf<T>) && packable(work.w);
      startRows<T>(on, work, x, packs);
    });
  });
}

void CudaBackend::layerNormBackwardWeight(Stream& s, InOut dw, OptInOut dBias, In dy, In x, In mean, In rstd) {
  checkLayerNormBackwardWeight(dw, dBias, dy, x, mean, rstd);
  const int64_t width = x.dim(-1), rows = x.numel() / width;
  if (rows == 0) return;
  const Scratch scratch(*this, s, columnSumBytes<2>(rows, width));
  const Launch on(s);
  s.enqueue("layerNormBackwardWeight", [=, parts = scratch.as<float>()] {
    const ColumnSums<2> sums{{dw.as<float>(), dBias.present() ? dBias.as<float>() : nullptr}};
    const auto* m = mean.as<const float>();
    const auto* r = rstd.as<const float>();
    dispatchFloat(x.dtype, [&](auto zero) {
      using T = decltype(zero);
      constexpr int kPack = kPackOf<T>;
      const RowsOf<const T> gradient(dy), in(x);
      if (columnPacks<T>(dy, x)) {
        startColumnSums<kPack>(on, sums, parts, LayerWeight<kPack, T>{gradient, in, m, r}, rows, width);
      } else {
        startColumnSums<1>(on, sums, parts, LayerWeight<1, T>{gradient, in, m, r}, rows, width);
      }
    });
  });
}

namespace {
const Support support{{"rmsNormBackwardInput", Takes::Float},
                      {"rmsNormBackwardWeight", Takes::Float},
                      {"layerNormBackwardInput", Takes::Float},
                      {"layerNormBackwardWeight", Takes::Float}};
}

}  // namespace viaduct::cuda
