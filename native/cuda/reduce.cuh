// Sums and maxima over the threads of a warp and of a block, in an order that the number of threads alone decides.
#pragma once

#include "launch.cuh"

namespace viaduct::cuda {

/// The sum over the warp's lanes, in each of them. All lanes call it.
template <typename T>
__device__ __forceinline__ T warpSum(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

/// The sum over a block of kThreads threads, in each of them. All threads call it; it may be called again at once.
template <int kThreads, typename T>
__device__ __forceinline__ T blockSum(T value) {
  static_assert(kThreads % kWarp == 0 && kThreads <= 1024);
  __shared__ T parts[kThreads / kWarp];
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  value = warpSum(value);
  if (thread % kWarp == 0) parts[thread / kWarp] = value;
  __syncthreads();
  T total = parts[0];
#pragma unroll
  for (int i = 1; i < kThreads / kWarp; ++i) total += parts[i];
  __syncthreads();  // before the next call writes
  return total;
}

/// The largest over a block of kThreads threads, as blockSum. A NaN may be lost.
template <int kThreads, typename T>
__device__ __forceinline__ T blockMax(T value) {
  static_assert(kThreads % kWarp == 0 && kThreads <= 1024);
  __shared__ T parts[kThreads / kWarp];
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = other > value ? other : value;
  }
  if (thread % kWarp == 0) parts[thread / kWarp] = value;
  __syncthreads();
  T most = parts[0];
#pragma unroll
  for (int i = 1; i < kThreads / kWarp; ++i) most = parts[i] > most ? parts[i] : most;
  __syncthreads();  // before the next call writes
  return most;
}

}  // namespace viaduct::cuda
