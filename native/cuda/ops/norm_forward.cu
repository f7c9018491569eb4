// RMSNorm and LayerNorm, forward. A row is a warp's or a block's, whichever holds it in its registers: read once, normalised,
// written. Sums of a thread are F32, of a row F64. Roundings are those of the CPU (cpu/norm.cc).
#include "../norm_rows.cuh"

#include "../../checks/ops.h"
#include "../cuda_backend.h"

namespace viaduct::cuda {

namespace {

template <typename T, typename Weight>
struct RmsForward {
  RowsOf<T> y, sum;
  RowsOf<const T> x, residual;
  const Weight* w;
  float* rstd;
  double eps;
  bool zeroCentered;

  template <int W, int kPer>
  __device__ void row(int64_t t, int64_t width) const {
    const T *in = x[t], *more = residual.data == nullptr ? nullptr : residual[t];
    T *out = y[t], *added = sum.data == nullptr ? nullptr : sum[t];
    KeptRow<W, kPer> h;
    float squares = 0;
    h.fill(width, [&](int64_t i, float(&row)[1][W]) {
      auto& v = row[0];
      loadPack(in + i, v);
      if (more != nullptr) {
        float r[W];
        loadPack(more + i, r);
#pragma unroll
        for (int k = 0; k < W; ++k) v[k] = widen(narrow<T>(v[k] + r[k]));
        storePack(added + i, v);
      }
#pragma unroll
      for (int k = 0; k < W; ++k) squares += v[k] * v[k];
    });
    const double total = rowSum<kPer>(static_cast<double>(squares));
    const float scale = 1.0f / sqrtf(static_cast<float>(total / static_cast<double>(width) + eps));
    if (laneOfRow<kPer>() == 0) rstd[t] = scale;
    const T* again = more == nullptr ? in : added;
    h.each(
        width, [&](int64_t i, float(&row)[1][W]) { loadPack(again + i, row[0]); },
        [&](int64_t i, float(&row)[1][W]) {
          auto& v = row[0];
          float weight[W];
          loadPack(w + i, weight);
#pragma unroll
          for (int k = 0; k < W; ++k)
            v[k] = zeroCentered ? v[k] * scale * (1.0f + weight[k]) : widen(narrow<T>(v[k] * scale)) * weight[k];
          storePack(out + i, v);
        });
  }
};

template <typename T, typename Weight>
struct LayerForward {
  RowsOf<T> y;
  RowsOf<const T> x;
  const Weight *w, *bias;
  float *mean, *rstd;
  double eps;
  float offset;

  template <int W, int kPer>
  __device__ void row(int64_t t, int64_t width) const {
    const T* in = x[t];
    T* out = y[t];
    KeptRow<W, kPer> h;
    float sum = 0;
    h.fill(width, [&](int64_t i, float(&row)[1][W]) {
      auto& v = row[0];
      loadPack(in + i, v);
#pragma unroll
      for (int k = 0; k < W; ++k) sum += v[k];
    });
    const float m = static_cast<float>(rowSum<kPer>(static_cast<double>(sum)) / static_cast<double>(width));
    const auto load = [&](int64_t i, float(&row)[1][W]) { loadPack(in + i, row[0]); };
    float squares = 0;
    h.each(width, load, [&](int64_t, float(&row)[1][W]) {
      auto& v = row[0];
#pragma unroll
      for (int k = 0; k < W; ++k) squares += (v[k] - m) * (v[k] - m);
    });
    const double total = rowSum<kPer>(static_cast<double>(squares));
    const float scale = 1.0f / sqrtf(static_cast<float>(total / static_cast<double>(width) + eps));
    if (laneOfRow<kPer>() == 0) {
      mean[t] = m;
      rstd[t] = scale;
    }
    h.each(width, load, [&](int64_t i, float(&row)[1][W]) {
      auto& v = row[0];
      float weight[W], more[W] = {};
      loadPack(w + i, weight);
      if (bias != nullptr) loadPack(bias + i, more);
#pragma unroll
      for (int k = 0; k < W; ++k) v[k] = (v[k] - m) * scale * (weight[k] + offset) + more[k];
      storePack(out + i, v);
    });
  }
};

}  // namespace

void CudaBackend::rmsNormForward(Stream& s, Out y, Out rstd, OptOut sum, In x, OptIn residual, In w, double eps,
                                 bool zeroCentered) {
  checkRmsNormForward(y, rstd, sum, x, residual, w);
  const Launch on(s);
  s.enqueue("rmsNormForward", [=] {
    dispatchNorm(x.dtype, w.dtype, [&](auto zero, auto weight) {
      using T = decltype(zero);
      using Weight = decltype(weight);
      const RmsForward<T, Weight> work{RowsOf<T>(y),
                                       RowsOf<T>(sum),
                                       RowsOf<const T>(x),
                                       RowsOf<const T>(residual),
                                       w.as<const Weight>(),
                                       rstd.as<float>(),
                                       eps,
                                       zeroCentered};
      const bool packs = work.y.packs(kPackOf<T>) && work.sum.packs(kPackOf<T>) && work.x.packs(kPackOf<T>) &&
                         work.residual.packs(kPackOf<T>) && packable(work.w);
      startRows<T>(on, work, x, packs);
    });
  });
}

void CudaBackend::layerNormForward(Stream& s, Out y, Out mean, Out rstd, In x, In w, OptIn bias, double eps,
                                   bool zeroCentered) {
  checkLayerNormForward(y, mean, rstd, x, w, bias);
  const Launch on(s);
  s.enqueue("layerNormForward", [=] {
    dispatchNorm(x.dtype, w.dtype, [&](auto zero, auto weight) {
      using T = decltype(zero);
      using Weight = decltype(weight);
      const LayerForward<T, Weight> work{RowsOf<T>(y),
                                         RowsOf<const T>(x),
                                         w.as<const Weight>(),
                                         bias.present() ? bias.as<const Weight>() : nullptr,
                                         mean.as<float>(),
                                         rstd.as<float>(),
                                         eps,
                                         zeroCentered ? 1.0f : 0.0f};
      const bool packs =
          work.y.packs(kPackOf<T>) && work.x.packs(kPackOf<T>) && packable(work.w) && packable(work.bias);
      startRows<T>(on, work, x, packs);
    });
  });
}

namespace {
const Support support{{"rmsNormForward", Takes::Float}, {"layerNormForward", Takes::Float}};
}

}  // namespace viaduct::cuda
