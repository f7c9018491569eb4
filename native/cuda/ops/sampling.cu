// Argmax over the last dim: the first of the largest, a NaN above everything. Long rows are cut into pieces of fixed length, so
// that one token's logits keep the GPU busy.
#include "../../checks/ops.h"
#include "../cuda_backend.h"
#include "../launch.cuh"
#include "../numbers.cuh"
#include "../reduce.cuh"

namespace viaduct::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kPiece = 8192;  // columns that a block takes

/// A number that is larger for a larger value and, of equal values, for the one that comes first. 0: none.
using Rank = unsigned long long;

__device__ Rank rankOf(float value, int64_t column) {
  const uint32_t bits = bitsOf(value == 0 ? 0.0f : value);  // -0 equals 0
  uint32_t order = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
  if (value != value) order = 0xffffffffu;
  return static_cast<Rank>(order) << 32 | (0xffffffffu - static_cast<uint32_t>(column));
}

/// ranks[row, p]: the best of the p-th piece of a row.
template <int W, typename T>
__global__ void __launch_bounds__(kThreads)
    bestOfPieceKernel(Rank* ranks, const T* logits, int64_t stride, int64_t valid, int count) {
  const int64_t row = blockIdx.x / count, begin = blockIdx.x % count * kPiece;
  const int size = static_cast<int>(min(kPiece, valid - begin)), packs = size / W;
  const T* x = logits + row * stride + begin;
  float best = 0;
  int at = -1;
  const auto look = [&](float value, int column) {  // columns come in rising order
    if (at < 0 || (!(value <= best) && best == best)) {
      best = value;
      at = column;
    }
  };
#pragma unroll 4
  for (int i = threadIdx.x; i < packs; i += kThreads) {
    float v[W];
    widenAll(reinterpret_cast<const Pack<T, W>*>(x)[i], v);
#pragma unroll
    for (int k = 0; k < W; ++k) look(v[k], i * W + k);
  }
  for (int i = packs * W + threadIdx.x; i < size; i += kThreads) look(widen(x[i]), i);
  const Rank rank = blockMax<kThreads>(at < 0 ? Rank{0} : rankOf(best, begin + at));
  if (threadIdx.x == 0) ranks[blockIdx.x] = rank;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    bestOfRowKernel(int64_t* index, float* value, const Rank* ranks, const T* logits, int64_t stride, int64_t tokens,
                    int64_t vocabStart, int count) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= tokens) return;
  Rank best = 0;
  for (int p = 0; p < count; ++p) best = max(best, ranks[t * count + p]);
  const int64_t column = 0xffffffffu - static_cast<uint32_t>(best);
  index[t] = vocabStart + (best == 0 ? 0 : column);
  value[t] = best == 0 ? -INFINITY : widen(logits[t * stride + column]);  // none: a shard of padding alone
}

}  // namespace

void CudaBackend::argmax(Stream& s, Out index, Out value, In logits, int64_t vocabStart, int64_t vocabSize) {
  const int64_t valid = checkArgmax(index, value, logits, vocabStart, vocabSize);
  const int64_t tokens = logits.dim(0), stride = logits.stride[0];
  const int count = static_cast<int>((valid + kPiece - 1) / kPiece);
  const Scratch scratch(*this, s, static_cast<size_t>(tokens * count) * sizeof(Rank));
  const Launch on(s);
  s.enqueue("argmax", [=, ranks = scratch.as<Rank>()] {
    dispatchFloat(logits.dtype, [&](auto zero) {
      using T = decltype(zero);
      constexpr int kPack = kPackOf<T>;
      const T* x = logits.as<T>();
      const bool packs = packable(x) && stride % kPack == 0;
      on(packs ? bestOfPieceKernel<kPack, T> : bestOfPieceKernel<1, T>, static_cast<unsigned>(tokens * count), kThreads,
         ranks, x, stride, valid, count);
      on(bestOfRowKernel<T>, static_cast<unsigned>((tokens + kThreads - 1) / kThreads), kThreads, index.as<int64_t>(),
         value.as<float>(), ranks, x, stride, tokens, vocabStart, count);
    });
  });
}

namespace {
const Support support{{"argmax", Takes::Float}};
}

}  // namespace viaduct::cuda
