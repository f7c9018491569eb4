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
  PinnedBlock(void* data, struct PinnedPool& pool) : data_(data), pool_(pool) {}
  ~PinnedBlock();
  PinnedBlock(const PinnedBlock&) = delete;
  PinnedBlock& operator=(const PinnedBlock&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  PinnedPool& pool_;
};

/// Blocks of one size, of which so many are made when they are first needed.
struct PinnedPool {
  const size_t bytes;
  const int most;
  std::mutex mutex{};
  std::condition_variable returned{};
  std::vector<void*> free{};
  int made = 0;
};

constexpr size_t kPinnedBytes = size_t{4} << 20;  // of a large block: a transfer of this size runs at full speed

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
  /// A stream for work beside a stream of ops, made at its first use; the caller orders it with events.
  cudaStream_t beside(size_t index);
  /// Pinned memory for `bytes`, at most kPinnedBytes; waits for some to come back when all is out.
  std::shared_ptr<PinnedBlock> pinned(size_t bytes);

 private:
  friend class DeviceEvent;

  const int ordinal_;
  cudaDeviceProp properties_{};
  std::mutex mutex_;
  std::vector<cudaEvent_t> events_;
  std::vector<cudaStream_t> beside_;
  PinnedPool small_{size_t{16} << 10, 512};  // ids, slots, losses: many may be on their way
  PinnedPool large_{kPinnedBytes, 16};
};

}  // namespace viaduct::cuda
