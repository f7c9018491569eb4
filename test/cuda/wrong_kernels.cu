// Kernels that are wrong on purpose, and right ones beside them: what the emulation must catch, and what it must let pass.
// A program of its own: `wrong_kernels` prints a line for each, "NAME: " and the error, or "NAME: fine".
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "native/cuda/launch.cuh"
#include "native/cuda/numbers.cuh"
#include "native/cuda/reduce.cuh"
#include "native/plugin.h"

using namespace viaduct;
using namespace viaduct::cuda;

namespace {

constexpr int kThreads = 64;

__global__ void sumFine(float* y, const float* x, int64_t n) {
  float total = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) total += x[i];
  total = blockSum<kThreads>(total);
  const float again = blockSum<kThreads>(total / kThreads);
  if (threadIdx.x == 0) y[blockIdx.x] = again;
}

/// No barrier between writing and reading shared memory.
__global__ void sumWithoutBarrier(float* y, const float* x) {
  __shared__ float parts[kThreads];
  parts[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x == 0) {
    float total = 0;
    for (int i = 0; i < kThreads; ++i) total += parts[i];
    *y = total;
  }
}

/// No barrier before shared memory is used again.
__global__ void reuseWithoutBarrier(float* y, const float* x) {
  __shared__ float value;
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) value = x[round];
    __syncthreads();
    y[threadIdx.x] = value;
  }
}

__global__ void barrierInBranch(float* y) {
  if (threadIdx.x < 32) {
    __syncthreads();
    y[threadIdx.x] = 1;
  } else {
    __syncthreads();
    y[threadIdx.x] = 2;
  }
}

__global__ void unwrittenShared(float* y) {
  __shared__ float parts[kThreads];
  if (threadIdx.x != 5) parts[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = parts[threadIdx.x];
}

__global__ void readsPastEnd(float* y, const float* x, int64_t n) {
  for (int64_t i = threadIdx.x; i <= n; i += kThreads) y[threadIdx.x] = x[i];
}

__global__ void writesPastEnd(float* y, int64_t n) { y[threadIdx.x + n - kThreads + 1] = 1; }

__global__ void misalignedPack(float* y, const float* x) {
  const auto v = reinterpret_cast<const Pack<float, 4>*>(x + 1)[threadIdx.x];
  y[threadIdx.x] = v.at[0] + v.at[3];
}

__global__ void blocksShareAnElement(float* y) {
  if (threadIdx.x == 0) *y += 1;
}

__global__ void atomicFine(float* y) { atomicAdd(y, 1.0f); }

/// The last block adds up what the others have left, behind a fence and a count.
__global__ void lastBlock(float* y, float* parts, unsigned* count, bool fence) {
  if (threadIdx.x != 0) return;
  parts[blockIdx.x] = 1;
  if (fence) __threadfence();
  if (atomicAdd(count, 1u) != gridDim.x - 1) return;
  float total = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) total += parts[i];
  *y = total;
}

__global__ void shuffleFromNowhere(float* y) {
  if (threadIdx.x % 32 >= 16) return;
  y[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 16);
}

__global__ void lanesMissing(float* y) {
  if (threadIdx.x % 32 != 7) y[threadIdx.x] = warpSum(1.0f);
  __syncthreads();
}

__global__ void warpWithoutSync(float* y) {
  __shared__ float parts[32];
  if (threadIdx.x < 32) {
    parts[threadIdx.x] = 1;
    y[threadIdx.x] = parts[threadIdx.x ^ 1];
  }
}

__global__ void warpSyncFine(float* y) {
  __shared__ float parts[32];
  if (threadIdx.x < 32) {
    parts[threadIdx.x] = 1;
    __syncwarp();
    y[threadIdx.x] = parts[threadIdx.x ^ 1];
  }
}

__global__ void pastDynamicShared(float* y) {
  float* shared = dynamicShared<float>();
  shared[threadIdx.x + 1] = 1;
  __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x + 1];
}

}  // namespace

extern "C" viaduct::Plugin* viaductPlugin();

int main() {
  Plugin& plugin = *viaductPlugin();
  auto backend = plugin.open({0, {}, 7});
  auto stream = backend->createStream(1);
  constexpr int64_t n = 128;  // floats: a multiple of the allocator's grain
  auto* x = static_cast<float*>(backend->allocate(n * sizeof(float), *stream));
  auto* y = static_cast<float*>(backend->allocate(n * sizeof(float), *stream));
  auto* count = static_cast<unsigned*>(backend->allocate(sizeof(unsigned), *stream));
  const Launch on(*stream);
  const auto run = [&](const char* name, const std::function<void()>& start) {
    stream->enqueue("zero", [=] {
      check(cudaMemsetAsync(x, 0, n * sizeof(float), on.stream()), "memset");
      check(cudaMemsetAsync(y, 0, n * sizeof(float), on.stream()), "memset");
      check(cudaMemsetAsync(count, 0, sizeof(unsigned), on.stream()), "memset");
    });
    stream->enqueue("kernel", start);
    stream->drain();
    std::string text = "fine";
    if (const std::exception_ptr error = stream->error()) {
      try {
        std::rethrow_exception(error);
      } catch (const std::exception& e) {
        text = e.what();
      }
    }
    stream->reset();
    std::printf("%s: %s\n", name, text.c_str());
  };
  const float* in = x;
  run("sumFine", [=] { on(sumFine, 3, kThreads, y, in, n); });
  run("sumWithoutBarrier", [=] { on(sumWithoutBarrier, 1, kThreads, y, in); });
  run("reuseWithoutBarrier", [=] { on(reuseWithoutBarrier, 1, kThreads, y, in); });
  run("barrierInBranch", [=] { on(barrierInBranch, 1, kThreads, y); });
  run("unwrittenShared", [=] { on(unwrittenShared, 1, kThreads, y); });
  run("readsPastEnd", [=] { on(readsPastEnd, 1, kThreads, y, in, n); });
  run("writesPastEnd", [=] { on(writesPastEnd, 1, kThreads, y, n); });
  run("misalignedPack", [=] { on(misalignedPack, 1, 8, y, in); });
  run("blocksShareAnElement", [=] { on(blocksShareAnElement, 4, kThreads, y); });
  run("atomicFine", [=] { on(atomicFine, 4, kThreads, y); });
  run("lastBlockFine", [=] { on(lastBlock, 5, kThreads, y, y + 1, count, true); });
  run("lastBlockWithoutFence", [=] { on(lastBlock, 5, kThreads, y, y + 1, count, false); });
  run("shuffleFromNowhere", [=] { on(shuffleFromNowhere, 1, kThreads, y); });
  run("lanesMissing", [=] { on(lanesMissing, 1, kThreads, y); });
  run("warpWithoutSync", [=] { on(warpWithoutSync, 1, kThreads, y); });
  run("warpSyncFine", [=] { on(warpSyncFine, 1, kThreads, y); });
  run("pastDynamicShared", [=] { on.shared(kThreads * sizeof(float))(pastDynamicShared, 1, kThreads, y); });
  run("tooManyThreads", [=] { on(atomicFine, 1, 2048, y); });
  return 0;
}
