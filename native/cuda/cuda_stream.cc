// Worker, watcher and events of a CUDA stream; see cuda_stream.h.
#include "cuda_stream.h"

#include <utility>

namespace viaduct::cuda {

/// A point of a stream: first the worker has to come to it, then the GPU.
struct CudaStream::CudaEvent final : Event {
  bool done() const override { return host->done() && device->passed(); }
  void wait() override {
    host->wait();
    device->wait();
  }
  std::exception_ptr failure() const override { return host->failure(); }

  int64_t stream = 0;
  std::shared_ptr<Event> host;  // behind the record
  std::shared_ptr<DeviceEvent> device;
};

CudaStream::CudaStream(int64_t id, Device& device, std::function<void(WorkerStream*)> ended)
    : WorkerStream(id, std::move(ended), hooks(device)), device_(device) {
  device_.makeCurrent();
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  watcher_ = std::thread([this] { watch(); });
}

CudaStream::~CudaStream() {
  stop();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  watcher_.join();
  cudaStreamSynchronize(stream_);
  for (const Timed& t : timed_) {
    cudaEventDestroy(t.begin);
    cudaEventDestroy(t.end);
  }
  cudaStreamDestroy(stream_);
}

/// Made before this object is complete: `begin` may run at once, the others with the first command, which comes later.
WorkerHooks CudaStream::hooks(Device& device) {
  WorkerHooks hooks;
  hooks.begin = [&device] { device.makeCurrent(); };
  hooks.before = [this](const char* op) {
    Timed t{op, nullptr, nullptr};
    check(cudaEventCreate(&t.begin), "cudaEventCreate");
    check(cudaEventCreate(&t.end), "cudaEventCreate");
    check(cudaEventRecord(t.begin, stream_), "cudaEventRecord");
    timed_.push_back(t);
  };
  hooks.after = [this](const char*) { check(cudaEventRecord(timed_.back().end, stream_), "cudaEventRecord"); };
  return hooks;
}

std::shared_ptr<Event> CudaStream::record() {
  auto event = std::make_shared<CudaEvent>();
  event->stream = id();
  event->device = device_.event();
  pushAlways("record", [this, device = event->device] { cudaEventRecord(device->get(), stream_); });
  event->host = WorkerStream::record();
  return event;
}

void CudaStream::waitFor(std::shared_ptr<Event> event) {
  auto other = std::dynamic_pointer_cast<CudaEvent>(event);
  if (other == nullptr) return WorkerStream::waitFor(std::move(event));
  if (other->stream == id()) return;  // its own past
  if (!other->done() || other->failure() != nullptr) {
    enqueue("waitEvent", [this, other] {
      other->host->wait();
      if (const std::exception_ptr error = other->failure()) return fail(error);
      check(cudaStreamWaitEvent(stream_, other->device->get(), 0), "cudaStreamWaitEvent");
    });
  }
  noteWait(other->host);
}

void CudaStream::drain() {
  WorkerStream::drain();
  if (onWorker() || std::this_thread::get_id() == watcher_.get_id()) return;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    idle_.wait(lock, [this] { return waiting_.empty() && !watching_; });
  }
  notice(cudaStreamSynchronize(stream_), "");
}

void CudaStream::notify(std::function<void(std::exception_ptr)> done) {
  pushAlways("notify", [this, done = std::move(done)]() mutable { whenPassed(std::move(done)); });
}

void CudaStream::reset() {
  drain();
  WorkerStream::reset();
}

std::vector<OpTime> CudaStream::endProfile() {
  drain();
  for (const Timed& t : timed_) {
    float milliseconds = 0;
    if (cudaEventElapsedTime(&milliseconds, t.begin, t.end) == cudaSuccess) addTime(t.op, milliseconds / 1e3);
    cudaEventDestroy(t.begin);
    cudaEventDestroy(t.end);
  }
  timed_.clear();
  return WorkerStream::endProfile();
}

void CudaStream::whenPassed(std::function<void(std::exception_ptr)> then) {
  Waiting next{device_.event(), std::move(then), place(), cudaSuccess};
  next.recorded = cudaEventRecord(next.event->get(), stream_);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    waiting_.push_back(std::move(next));
  }
  work_.notify_one();
}

void CudaStream::watch() {
  device_.makeCurrent();
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    work_.wait(lock, [this] { return stopping_ || !waiting_.empty(); });
    if (waiting_.empty()) return;
    Waiting next = std::move(waiting_.front());
    waiting_.pop_front();
    watching_ = true;
    lock.unlock();
    notice(next.recorded == cudaSuccess ? next.event->wait() : next.recorded, next.place);
    next.then(error());
    next = {};
    lock.lock();
    watching_ = false;
    if (waiting_.empty()) idle_.notify_all();
  }
}

/// The GPU reports a failure at some later call; which command it was is not known, the place nearly.
void CudaStream::notice(cudaError_t status, const std::string& place) {
  if (status == cudaSuccess) return;
  fail(std::make_exception_ptr(
      Error("ERR_NATIVE", "cuda",
            "expected commands to succeed, got \"" + errorText(status) + "\"" +
                (place.empty() ? "" : " (at or before " + place + ")") +
                ": the process must start again; CUDA_LAUNCH_BLOCKING=1 shows which command fails")));
}

}  // namespace viaduct::cuda
