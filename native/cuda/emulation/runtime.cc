// The emulated GPU behind the runtime's and the driver's functions: one device with little memory. Everything that is started
// is done when the call returns, except collectives (pending.h).
#include <cuda.h>
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "block.h"
#include "pending.h"

struct EmulatedEvent {
  std::chrono::steady_clock::time_point at;
  viaduct::emulation::PendingList pending;
};

namespace {

using viaduct::emulation::lockEmulation;
using viaduct::emulation::shadow;
using viaduct::emulation::unlockEmulation;

constexpr size_t kMemory = size_t{512} << 20;

std::map<unsigned long long, size_t> pieces;  // of memory, by handle
size_t taken = 0;
unsigned long long nextHandle = 1;

struct Locked {
  Locked() { lockEmulation(); }
  ~Locked() { unlockEmulation(); }
};

bool inArena(const void* p) {
  const auto& arena = shadow().arena();
  return static_cast<size_t>(static_cast<const char*>(p) - arena.base) < arena.bytes;
}

}  // namespace

void viaduct::emulation::settle(cudaStream_t stream) {
  if (stream != nullptr) stream->pending.wait();
}

void viaduct::emulation::spend(cudaStream_t stream, std::chrono::microseconds time) { stream->spent += time; }

const char* cudaGetErrorName(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
  }
  return "cudaErrorUnknown";
}
const char* cudaGetErrorString(cudaError_t status) { return status == cudaSuccess ? "no error" : "emulated error"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int ordinal) { return ordinal == 0 ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "emulated GPU");
  properties->major = 9;
  properties->multiProcessorCount = 3;  // few, so that loops over a grid go round
  properties->totalGlobalMem = kMemory;
  properties->sharedMemPerBlockOptin = size_t{227} << 10;
  properties->l2CacheSize = 1 << 20;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult*) {
  static const std::map<std::string, void*> functions = {
      {"cuMemAddressReserve", reinterpret_cast<void*>(&cuMemAddressReserve)},
      {"cuMemAddressFree", reinterpret_cast<void*>(&cuMemAddressFree)},
      {"cuMemCreate", reinterpret_cast<void*>(&cuMemCreate)},
      {"cuMemRelease", reinterpret_cast<void*>(&cuMemRelease)},
      {"cuMemMap", reinterpret_cast<void*>(&cuMemMap)},
      {"cuMemUnmap", reinterpret_cast<void*>(&cuMemUnmap)},
      {"cuMemSetAccess", reinterpret_cast<void*>(&cuMemSetAccess)},
  };
  const auto found = functions.find(name);
  *function = found == functions.end() ? nullptr : found->second;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new EmulatedStream();
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  viaduct::emulation::settle(stream);
  return cudaSuccess;
}
/// Emulated streams cannot be captured.
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  stream->pending.add(event->pending.get());
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new EmulatedEvent();
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->pending.set(stream->pending.get());
  event->at = std::chrono::steady_clock::now() + stream->spent;
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return event->pending.done() ? cudaSuccess : cudaErrorNotReady; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  event->pending.wait();
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(end->at - begin->at).count();
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) {
  *data = std::malloc(bytes);
  return *data == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFreeHost(void* data) {
  std::free(data);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  viaduct::emulation::settle(stream);
  const Locked locked;
  if ((kind != cudaMemcpyDeviceToHost) != inArena(to) || (kind != cudaMemcpyHostToDevice) != inArena(from)) {
    return cudaErrorInvalidValue;
  }
  if (inArena(to) && !shadow().usable(to, bytes)) return cudaErrorInvalidValue;
  if (inArena(from) && !shadow().usable(from, bytes)) return cudaErrorInvalidValue;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
cudaError_t cudaMemcpy2D(void* to, size_t toPitch, const void* from, size_t fromPitch, size_t width, size_t rows,
                         cudaMemcpyKind kind) {
  if (width > toPitch || width > fromPitch) return cudaErrorInvalidValue;
  for (size_t i = 0; i < rows; ++i) {
    const cudaError_t status =
        cudaMemcpy(static_cast<char*>(to) + i * toPitch, static_cast<const char*>(from) + i * fromPitch, width, kind);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  viaduct::emulation::settle(stream);
  const Locked locked;
  if (!inArena(to) || !shadow().usable(to, bytes)) return cudaErrorInvalidValue;
  std::memset(to, value, bytes);
  return cudaSuccess;
}

CUresult cuMemAddressReserve(CUdeviceptr* at, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
  const Locked locked;
  if (shadow().arena().base != nullptr) return CUDA_ERROR_OUT_OF_MEMORY;  // one reservation is all that is needed
  void* memory = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  shadow().setArena({static_cast<char*>(memory), bytes});
  *at = reinterpret_cast<CUdeviceptr>(memory);
  return CUDA_SUCCESS;
}
CUresult cuMemAddressFree(CUdeviceptr at, size_t bytes) {
  const Locked locked;
  munmap(reinterpret_cast<void*>(at), bytes);
  shadow().setArena({});
  return CUDA_SUCCESS;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t bytes, const CUmemAllocationProp*,
                     unsigned long long) {
  const Locked locked;
  if (bytes % (size_t{2} << 20) != 0) return CUDA_ERROR_INVALID_VALUE;
  if (taken + bytes > kMemory) return CUDA_ERROR_OUT_OF_MEMORY;
  taken += bytes;
  pieces[*handle = nextHandle++] = bytes;
  return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  const Locked locked;
  const auto found = pieces.find(handle);
  if (found == pieces.end()) return CUDA_ERROR_INVALID_VALUE;
  taken -= found->second;
  pieces.erase(found);
  return CUDA_SUCCESS;
}
CUresult cuMemMap(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long) {
  return CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr at, size_t bytes) {
  void* memory = reinterpret_cast<void*>(at);
  madvise(memory, bytes, MADV_DONTNEED);
  return mprotect(memory, bytes, PROT_NONE) == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuMemSetAccess(CUdeviceptr at, size_t bytes, const CUmemAccessDesc*, size_t) {
  return mprotect(reinterpret_cast<void*>(at), bytes, PROT_READ | PROT_WRITE) == 0 ? CUDA_SUCCESS
                                                                                   : CUDA_ERROR_OUT_OF_MEMORY;
}
