// One GPU as streams and ops see it: facts, a pool of events, a pool of pinned host memory. Thread-safe.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "runtime.h"

namespace viaduct::cuda {

/// A CUDA event that goes back to its pool with its last owner.
class DeviceEvent {
 public:
  explicit DeviceEvent(cudaEvent_t event, class Device& device) : event_(event), device_(device) {}
  ~DeviceEvent();
  DeviceEvent(const DeviceEvent&) = delete;
  DeviceEvent& operator=(const DeviceEvent&) = delete;
  cudaEvent_t get() const { return event_; }
  /// Whether the device has passed it; also true after a failure.
  bool passed() const { return cudaEventQuery(event_) != cudaErrorNotReady; }
  /// Blocks until the device has passed it: spins shortly, then sleeps.
  cudaError_t wait() const;

 private:
  cudaEvent_t event_;
  Device& device_;
};

/// Page-locked host memory, for copies that run beside compute. Goes back to its pool with its last owner.
class PinnedBlock {
 public:
  PinnedBlock(void* data, Device& device) : data_(data), device_(device) {}
  ~PinnedBlock();
  PinnedBlock(const PinnedBlock&) = delete;
  PinnedBlock& operator=(const PinnedBlock&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  Device& device_;
};

constexpr size_t kPinnedBytes = size_t{4} << 20;  // of one block: a transfer of this size runs at full speed
constexpr int kPinnedBlocks = 16;

class Device {
 public:
  /// Throws ERR_UNSUPPORTED when there is no such GPU.
  explicit Device(int ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  /// Makes this GPU the calling thread's.
  void makeCurrent() const;

  int ordinal() const { return ordinal_; }
  int multiprocessors() const { return properties_.multiProcessorCount; }
  const cudaDeviceProp& properties() const { return properties_; }

  std::shared_ptr<DeviceEvent> event();
  /// kPinnedBytes of pinned memory; waits for one to come back when all are out.
  std::shared_ptr<PinnedBlock> pinned();

 private:
  friend class DeviceEvent;
  friend class PinnedBlock;

  const int ordinal_;
  cudaDeviceProp properties_{};
  std::mutex mutex_;
  std::condition_variable returned_;
  std::vector<cudaEvent_t> events_;
  std::vector<void*> blocks_;
  int made_ = 0;  // pinned blocks in all
};

}  // namespace viaduct::cuda
