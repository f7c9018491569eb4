// Starting kernels: the one place that does. A file of ops looks like this (docs/cuda.md has the whole of it):
//
//   template <typename T> __global__ void addKernel(T* y, const T* a, const T* b, int64_t n) { ... }
//   void CudaBackend::add(Stream& s, Out y, In a, In b) {
//     checkBinary("add", y, a, b);
//     const Launch on(s);
//     s.enqueue("add", [=] { on(addKernel<T>, on.blocksFor(n, 256), 256, ...arguments); });
//   }
#pragma once

#include <cstdint>
#include <tuple>
#include <utility>

#include "cuda_stream.h"

namespace viaduct::cuda {

constexpr int kWarp = 32;

#ifdef VIADUCT_EMULATE
/// The block's dynamic shared memory; 16-byte aligned.
template <typename T>
T* dynamicShared() {
  return static_cast<T*>(emulation::dynamicShared());
}
#elif defined(__CUDACC__)
template <typename T>
__device__ __forceinline__ T* dynamicShared() {
  extern __shared__ __align__(16) unsigned char viaductDynamicShared[];
  return reinterpret_cast<T*>(viaductDynamicShared);
}
#endif

/// Where and how kernels start, by value in a command. Call it there: (kernel, grid, block, arguments...), or `shared` first
/// to say how many bytes of dynamic shared memory a block gets.
class Launch {
 public:
  explicit Launch(Stream& s)
      : stream_(cudaStream(s).get()), multiprocessors_(cudaStream(s).device().multiprocessors()) {}

  cudaStream_t stream() const { return stream_; }
  int multiprocessors() const { return multiprocessors_; }

  /// Blocks for a grid-stride loop over `n` items of which a block takes `perBlock` at a time: never more than the GPU can
  /// hold several times over.
  int blocksFor(int64_t n, int64_t perBlock, int perMultiprocessor = 16) const {
    const int64_t wanted = (n + perBlock - 1) / perBlock;
    const int64_t most = static_cast<int64_t>(multiprocessors_) * perMultiprocessor;
    return static_cast<int>(wanted < most ? wanted : most);
  }

  Launch shared(size_t bytes) const {
    Launch with = *this;
    with.sharedBytes_ = bytes;
    return with;
  }

  template <typename... P, typename... A>
  void operator()(void (*kernel)(P...), dim3 grid, dim3 block, A&&... arguments) const {
    static_assert(sizeof...(P) == sizeof...(A), "as many arguments as the kernel has parameters");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    std::tuple<std::decay_t<P>...> values{static_cast<std::decay_t<P>>(arguments)...};
#ifdef VIADUCT_EMULATE
    check(emulation::launch(stream_, grid, block, sharedBytes_, [&] { std::apply(kernel, values); }), "launch");
#else
    constexpr size_t kSharedByDefault = size_t{48} << 10;
    const void* function = reinterpret_cast<const void*>(kernel);
    if (sharedBytes_ > kSharedByDefault) {
      check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sharedBytes_)),
            "cudaFuncSetAttribute");
    }
    std::apply(
        [&](auto&... value) {
          void* pointers[] = {&value...};
          check(cudaLaunchKernel(function, grid, block, pointers, sharedBytes_, stream_), "launch");
        },
        values);
#endif
  }

 private:
  cudaStream_t stream_;
  int multiprocessors_;
  size_t sharedBytes_ = 0;
};

}  // namespace viaduct::cuda
