// Work of an emulated stream that goes on after its call has returned: only collectives do. What is started on the stream later
// waits for it, events that are recorded behind it are not passed before it ends.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

namespace viaduct::emulation {

class Pending {
 public:
  void finish() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      done_ = true;
    }
    changed_.notify_all();
  }
  bool done() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return done_;
  }
  void wait() const {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return done_; });
  }
  bool waitFor(std::chrono::milliseconds time) const {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, time, [this] { return done_; });
  }

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool done_ = false;
};

/// What a stream or an event waits for.
class PendingList {
 public:
  using Items = std::vector<std::shared_ptr<Pending>>;
  Items get() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return items_;
  }
  void set(Items items) {
    std::lock_guard<std::mutex> lock(mutex_);
    items_ = std::move(items);
  }
  void add(const Items& more) {
    std::lock_guard<std::mutex> lock(mutex_);
    items_.erase(std::remove_if(items_.begin(), items_.end(), [](const auto& item) { return item->done(); }),
                 items_.end());
    items_.insert(items_.end(), more.begin(), more.end());
  }
  bool done() const {
    const Items items = get();
    return std::all_of(items.begin(), items.end(), [](const auto& item) { return item->done(); });
  }
  void wait() const {
    for (const auto& item : get()) item->wait();
  }

 private:
  mutable std::mutex mutex_;
  Items items_;
};

}  // namespace viaduct::emulation

struct EmulatedStream {
  std::chrono::microseconds spent{0};  // by the algorithms of twins, for what events show
  viaduct::emulation::PendingList pending;
};
