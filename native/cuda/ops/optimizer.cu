// The optimizer's kernels: sums of squares in F64, the clipping factor, one fused AdamW pass. AdamW has the CPU's bits, but for
// a few of the parameters in a hundred thousand, which are one unit in the last place away: the CPU corrects the last rounding
// with a rougher reciprocal.
#include <cfloat>

#include "../../adamw.h"
#include "../../checks/ops.h"
#include "../cuda_backend.h"
#include "../launch.cuh"
#include "../numbers.cuh"
#include "../reduce.cuh"

namespace viaduct::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kSquaresGrain = 16384;  // elements of one partial sum

/// parts[b] = sum of squares of the b-th run of kSquaresGrain elements. Squares of F32 are exact in F64.
template <int W, typename T>
__global__ void __launch_bounds__(kThreads) squaresKernel(double* parts, const T* x, int64_t n) {
  const int64_t begin = blockIdx.x * kSquaresGrain;
  const int size = static_cast<int>(min(kSquaresGrain, n - begin)), packs = size / W;
  x += begin;
  double total = 0;
  const auto add = [&](double v) { total = fma(v, v, total); };
#pragma unroll 4
  for (int i = threadIdx.x; i < packs; i += kThreads) {
    float v[W];
    widenAll(reinterpret_cast<const Pack<T, W>*>(x)[i], v);
#pragma unroll
    for (int k = 0; k < W; ++k) add(v[k]);
  }
  for (int i = packs * W + threadIdx.x; i < size; i += kThreads) add(widen(x[i]));
  total = blockSum<kThreads>(total);
  if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads) addPartsKernel(double* acc, const double* parts, int64_t n) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) total += parts[i];
  total = blockSum<kThreads>(total);
  if (threadIdx.x == 0) *acc += total;
}

__global__ void clipFactorKernel(float* norm, float* factor, const double* acc, double maxNorm) {
  const double total = sqrt(*acc);
  *norm = static_cast<float>(total);
  const double ratio = maxNorm / (total + 1e-6);
  // Written so that a NaN norm gives a NaN factor.
  *factor = maxNorm <= 0 || ratio > 1.0 ? 1.0f : static_cast<float>(ratio);
}

/// p + step * m / (sqrt(v) + eps), rounded about once, as the CPU does it: each rounding of the plain formula is made good to
/// first order. Roundings are spelled out, so that the compiler fuses nothing else.
__device__ __forceinline__ float addQuotient(float p, float m, float v, const AdamwStep& by) {
  const float root = __fsqrt_rn(v);
  const float bottom = __fadd_rn(root, by.eps);
  const float top = __fmul_rn(by.step, m);
  const float q = __fdiv_rn(top, bottom);
  const float sum = __fadd_rn(p, q);
  const float rootLow = __fmul_rn(__fmul_rn(__fmaf_rn(-root, root, v), 0.5f), __frcp_rn(root));
  const float big = fmaxf(root, by.eps), small = fminf(root, by.eps);
  const float bottomLow = __fadd_rn(__fadd_rn(small, -__fadd_rn(bottom, -big)), __fadd_rn(rootLow, by.epsLow));
  const float topLow = __fmaf_rn(by.stepLow, m, __fmaf_rn(by.step, m, -top));
  const float rest = __fadd_rn(__fmaf_rn(-q, bottom, top), __fmaf_rn(-q, bottomLow, topLow));
  const float back = __fadd_rn(sum, -p);
  const float sumLow = __fadd_rn(__fadd_rn(p, -__fadd_rn(sum, -back)), __fadd_rn(q, -back));
  const float low = __fmaf_rn(rest, __frcp_rn(bottom), sumLow);
  return fabsf(low) < FLT_MAX ? __fadd_rn(sum, low) : sum;  // zero or infinite somewhere: the plain formula stands
}

__device__ __forceinline__ void adamwOne(float& p, float& m, float& v, float grad, const AdamwStep& by) {
  const float g = __fmul_rn(grad, by.gradFactor);
  // lerp as PyTorch rounds it: from the nearer end.
  const bool nearOld = by.lerp < 0.5f;
  m = __fmaf_rn(nearOld ? by.lerp : by.lerp - 1.0f, __fadd_rn(g, -m), nearOld ? m : g);
  v = __fmaf_rn(__fmul_rn(by.rest2, g), g, __fmul_rn(v, by.beta2));
  p = addQuotient(__fmul_rn(p, by.decay), m, v, by);
}

struct NoModel {};

struct AdamwArgs {
  float *param, *m, *v;
  const float *grad, *slots;
  int64_t n;
  double beta1, beta2, eps, weightDecay;
};

template <int W, typename M>
__global__ void __launch_bounds__(kThreads) adamwKernel(AdamwArgs a, M* model) {
  __shared__ AdamwStep shared;
  if (threadIdx.x == 0) shared = adamwStep(a.slots, a.beta1, a.beta2, a.eps, a.weightDecay);
  __syncthreads();
  const AdamwStep by = shared;
  const int64_t packs = a.n / W, step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = first; i < packs; i += step) {
    using Floats = Pack<float, W>;
    Floats p = reinterpret_cast<Floats*>(a.param)[i], m = reinterpret_cast<Floats*>(a.m)[i];
    Floats v = reinterpret_cast<Floats*>(a.v)[i];
    const Floats grad = reinterpret_cast<const Floats*>(a.grad)[i];
#pragma unroll
    for (int k = 0; k < W; ++k) adamwOne(p.at[k], m.at[k], v.at[k], grad.at[k], by);
    reinterpret_cast<Floats*>(a.param)[i] = p;
    reinterpret_cast<Floats*>(a.m)[i] = m;
    reinterpret_cast<Floats*>(a.v)[i] = v;
    if constexpr (!std::is_same_v<M, NoModel>) {
      Pack<M, W> copy;
#pragma unroll
      for (int k = 0; k < W; ++k) copy.at[k] = fromFloat<M>(p.at[k]);
      reinterpret_cast<Pack<M, W>*>(model)[i] = copy;
    }
  }
  for (int64_t i = packs * W + first; i < a.n; i += step) {
    adamwOne(a.param[i], a.m[i], a.v[i], a.grad[i], by);
    if constexpr (!std::is_same_v<M, NoModel>) model[i] = fromFloat<M>(a.param[i]);
  }
}

template <typename M>
void startAdamw(const Launch& on, const AdamwArgs& a, M* model) {
  constexpr int kPack = 4;
  const bool packs = packable(a.param, a.m, a.v, a.grad) && reinterpret_cast<uintptr_t>(model) % (kPack * 2) == 0;
  on(packs ? adamwKernel<kPack, M> : adamwKernel<1, M>, on.blocksFor(a.n, kThreads * (packs ? kPack : 1), 8), kThreads,
     a, model);
}

}  // namespace

void CudaBackend::sumSquares(Stream& s, InOut acc, In x) {
  checkSumSquares(acc, x);
  const int64_t n = x.numel(), parts = (n + kSquaresGrain - 1) / kSquaresGrain;
  const Scratch scratch(*this, s, static_cast<size_t>(parts) * sizeof(double));
  const Launch on(s);
  s.enqueue("sumSquares", [=, partial = scratch.as<double>()] {
    dispatchFloat(x.dtype, [&](auto zero) {
      using T = decltype(zero);
      on(packable(x.as<T>()) ? squaresKernel<kPackOf<T>, T> : squaresKernel<1, T>, static_cast<unsigned>(parts),
         kThreads, partial, x.as<T>(), n);
    });
    if (parts > 0) on(addPartsKernel, 1, kThreads, acc.as<double>(), partial, parts);
  });
}

void CudaBackend::clipFactor(Stream& s, Out norm, Out factor, In acc, double maxNorm) {
  checkClipFactor(norm, factor, acc);
  const Launch on(s);
  s.enqueue("clipFactor",
            [=] { on(clipFactorKernel, 1, 1, norm.as<float>(), factor.as<float>(), acc.as<double>(), maxNorm); });
}

void CudaBackend::adamw(Stream& s, InOut param, InOut m, InOut v, OptOut model, In grad, In slots, double beta1,
                        double beta2, double eps, double weightDecay) {
  checkAdamw(param, m, v, model, grad, slots);
  const AdamwArgs a{param.as<float>(),
                    m.as<float>(),
                    v.as<float>(),
                    grad.as<float>(),
                    slots.as<float>(),
                    param.numel(),
                    beta1,
                    beta2,
                    eps,
                    weightDecay};
  const Launch on(s);
  s.enqueue("adamw", [=] {
    if (!model.present()) return startAdamw(on, a, static_cast<NoModel*>(nullptr));
    if (model.dtype == DType::BF16) return startAdamw(on, a, model.as<BF16>());
    startAdamw(on, a, model.as<F16>());
  });
}

namespace {
const Support support{{"sumSquares", Takes::Float}, {"clipFactor", Takes::Float32}, {"adamw", Takes::Float32}};
}

}  // namespace viaduct::cuda
