// Facts and pools of a GPU; see device.h.
#include "device.h"

#include <chrono>
#include <thread>

namespace viaduct::cuda {

std::string errorText(cudaError_t status) {
  return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
}

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that is not sticky must not show up again at the next call
  throw Error(status == cudaErrorMemoryAllocation ? "ERR_OUT_OF_MEMORY" : "ERR_NATIVE", "cuda",
              std::string("expected ") + what + " to succeed, got \"" + errorText(status) +
                  "\": CUDA_LAUNCH_BLOCKING=1 shows which command fails");
}

DeviceEvent::~DeviceEvent() {
  std::lock_guard<std::mutex> lock(device_.mutex_);
  device_.events_.push_back(event_);
}

cudaError_t DeviceEvent::wait() const {
  constexpr auto kSpin = std::chrono::microseconds(50);  // about what a sleep and a wake-up cost
  const auto until = std::chrono::steady_clock::now() + kSpin;
  do {
    const cudaError_t status = cudaEventQuery(event_);
    if (status != cudaErrorNotReady) return status;
    std::this_thread::yield();
  } while (std::chrono::steady_clock::now() < until);
  return cudaEventSynchronize(event_);
}

PinnedBlock::~PinnedBlock() {
  {
    std::lock_guard<std::mutex> lock(pool_.mutex);
    pool_.free.push_back(data_);
  }
  pool_.returned.notify_one();
}

Device::Device(int ordinal) : ordinal_(ordinal) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  VIADUCT_CHECK(status == cudaSuccess && ordinal >= 0 && ordinal < count, "ERR_UNSUPPORTED", "device",
                "expected GPU " + std::to_string(ordinal) + ", got " + std::to_string(count) + " GPUs" +
                    (status == cudaSuccess ? "" : " and \"" + errorText(status) + "\"") +
                    ": check nvidia-smi and CUDA_VISIBLE_DEVICES, or take --device cpu");
  makeCurrent();
  check(cudaGetDeviceProperties(&properties_, ordinal), "cudaGetDeviceProperties");
  VIADUCT_CHECK(properties_.major >= 8, "ERR_UNSUPPORTED", "device",
                std::string("expected a GPU of compute capability 8.0 or more, got ") + properties_.name + " of " +
                    std::to_string(properties_.major) + "." + std::to_string(properties_.minor) +
                    ": take --device cpu");
}

Device::~Device() {
  for (cudaStream_t stream : beside_) cudaStreamDestroy(stream);
  for (cudaEvent_t event : events_) cudaEventDestroy(event);
  for (const PinnedPool* pool : {&small_, &large_}) {
    for (void* block : pool->free) cudaFreeHost(block);
  }
}

void Device::makeCurrent() const { check(cudaSetDevice(ordinal_), "cudaSetDevice"); }

std::shared_ptr<DeviceEvent> Device::event() {
  cudaEvent_t event = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!events_.empty()) {
      event = events_.back();
      events_.pop_back();
    }
  }
  if (event == nullptr) {
    makeCurrent();
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync), "cudaEventCreate");
  }
  return std::make_shared<DeviceEvent>(event, *this);
}

cudaStream_t Device::beside(size_t index) {
  std::lock_guard<std::mutex> lock(mutex_);
  while (beside_.size() <= index) {
    cudaStream_t stream = nullptr;
    makeCurrent();
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    beside_.push_back(stream);
  }
  return beside_[index];
}

std::shared_ptr<PinnedBlock> Device::pinned(size_t bytes) {
  PinnedPool& pool = bytes <= small_.bytes ? small_ : large_;
  std::unique_lock<std::mutex> lock(pool.mutex);
  if (pool.free.empty() && pool.made < pool.most) {
    void* data = nullptr;
    check(cudaHostAlloc(&data, pool.bytes, cudaHostAllocPortable), "cudaHostAlloc");
    pool.made += 1;
    pool.free.push_back(data);
  }
  pool.returned.wait(lock, [&pool] { return !pool.free.empty(); });
  void* data = pool.free.back();
  pool.free.pop_back();
  return std::make_shared<PinnedBlock>(data, pool);
}

}  // namespace viaduct::cuda
