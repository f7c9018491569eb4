// A CUDA stream behind a worker's queue: the worker starts kernels and copies, the GPU runs them in the same order, and a
// second thread, the watcher, waits for what the GPU has passed: it settles promises, returns staging memory and notices
// failures. So neither the JavaScript thread nor the worker ever waits for the GPU, except for staging memory.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../worker_stream.h"
#include "device.h"

namespace viaduct::cuda {

class CudaStream final : public WorkerStream {
 public:
  CudaStream(int64_t id, Device& device, std::function<void(WorkerStream*)> ended);
  ~CudaStream() override;

  std::shared_ptr<Event> record() override;
  void waitFor(std::shared_ptr<Event> event) override;
  void drain() override;
  void notify(std::function<void(std::exception_ptr)> done) override;
  void reset() override;
  std::vector<OpTime> endProfile() override;

  cudaStream_t get() const { return stream_; }
  Device& device() const { return device_; }

  /// From a command: runs `then` on the watcher once the GPU has passed what was started so far, in order, also after a
  /// failure, which it is given.
  void whenPassed(std::function<void(std::exception_ptr)> then);
  /// The place that holds for the command that runs.
  using WorkerStream::place;
  /// Runs `command` on the worker in its order, also when the stream is poisoned. It must not throw.
  template <typename F>
  void always(const char* op, F command) {
    pushAlways(op, std::move(command));
  }

 private:
  struct CudaEvent;
  struct Waiting {
    std::shared_ptr<DeviceEvent> event;
    std::function<void(std::exception_ptr)> then;
    std::string place;
    cudaError_t recorded = cudaSuccess;
  };
  struct Timed {
    const char* op;
    cudaEvent_t begin;
    cudaEvent_t end;
  };
  WorkerHooks hooks(Device& device);
  void watch();
  void notice(cudaError_t status, const std::string& place);

  Device& device_;
  cudaStream_t stream_ = nullptr;
  std::vector<Timed> timed_;  // the worker's; read when it is idle
  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable idle_;
  std::deque<Waiting> waiting_;
  bool watching_ = false;  // the watcher handles one that has left the queue
  bool stopping_ = false;
  std::thread watcher_;
};

/// Every stream that a CUDA backend is given is one that it made.
inline CudaStream& cudaStream(Stream& stream) { return static_cast<CudaStream&>(stream); }

}  // namespace viaduct::cuda
