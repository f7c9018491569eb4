// The team: helpers that take tasks beside the caller. One word says whether a job is open and how many helpers are inside;
// a helper enters only while it is open, and the caller, once no task is left, closes it and waits for those inside.
#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

namespace viaduct::cpu {

namespace {

std::atomic<int> threads{0};  // 0: not set, use the machine's
thread_local bool inTask = false;

// Between two ops of a stream there are a few microseconds; a sleeping helper costs about 50 to wake.
constexpr auto kSpin = std::chrono::microseconds(100);

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Team {
 public:
  /// Never destroyed: helpers sleep in it until the process ends.
  static Team& instance() {
    static Team* team = new Team();
    return *team;
  }

  /// False if another thread has the team. Throws what a task threw, after all threads have left the job.
  bool run(int64_t tasks, int wanted, void (*task)(const void*, int64_t), const void* context) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    for (; started_ < wanted - 1; ++started_) std::thread([this, index = started_] { help(index); }).detach();
    tasks_ = tasks;
    task_ = task;
    context_ = context;
    next_.store(0, std::memory_order_relaxed);
    limit_ = static_cast<int>(std::min<int64_t>(wanted - 1, tasks - 1));
    const uint64_t job = ((state_.load(std::memory_order_relaxed) >> kJobShift) + 1) << kJobShift;
    state_.store(job | kOpen);  // sequentially consistent, as `sleepers_`: one of the two sees the other
    if (sleepers_.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex_); }
      wake_.notify_all();
    }
    work();
    state_.fetch_and(~kOpen);
    for (int spins = 0; (state_.load(std::memory_order_acquire) & kInside) != 0; ++spins) {
      if (spins < 4096) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
    if (failure_ != nullptr) std::rethrow_exception(std::exchange(failure_, nullptr));
    return true;
  }

 private:
  static constexpr uint64_t kOpen = 1;
  static constexpr uint64_t kOne = 2;  // a helper inside
  static constexpr int kJobShift = 20;
  static constexpr uint64_t kInside = (uint64_t{1} << kJobShift) - kOne;

  void work() {
    inTask = true;
    for (;;) {
      const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
      if (i >= tasks_) break;
      try {
        task_(context_, i);
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (failure_ == nullptr) failure_ = std::current_exception();
        next_.store(tasks_, std::memory_order_relaxed);  // tasks that have not begun are left out
      }
    }
    inTask = false;
  }

  void help(int index) {
    uint64_t last = 0;  // the job that this helper has worked on
    for (;;) {
      uint64_t state = waitForJob(last);
      last = state >> kJobShift;
      // The state may be that of a later job by now: enter only the one that was seen.
      while ((state & kOpen) != 0 && state >> kJobShift == last) {
        if (!state_.compare_exchange_weak(state, state + kOne, std::memory_order_acquire)) continue;
        if (index < limit_) work();
        state_.fetch_sub(kOne, std::memory_order_release);
        break;
      }
    }
  }

  /// The state of an open job other than `last`.
  uint64_t waitForJob(uint64_t last) {
    const auto isNew = [&](uint64_t state) { return (state & kOpen) != 0 && state >> kJobShift != last; };
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 64; ++i) {
        const uint64_t state = state_.load(std::memory_order_relaxed);
        if (isNew(state)) return state;
        pause();
      }
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    uint64_t state = 0;
    wake_.wait(lock, [&] { return isNew(state = state_.load()); });
    sleepers_.fetch_sub(1);
    return state;
  }

  std::mutex owner_;  // of the job
  int started_ = 0;
  // The job; constant while it is open or a helper is inside.
  int64_t tasks_ = 0;
  void (*task_)(const void*, int64_t) = nullptr;
  const void* context_ = nullptr;
  int limit_ = 0;
  std::exception_ptr failure_;  // the first of the job
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace

int numThreads() {
  const int n = threads.load(std::memory_order_relaxed);
  if (n > 0) return n;
  static const int machine = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));  // it reads a file
  return machine;
}

void setNumThreads(int n) { threads.store(std::max(0, n), std::memory_order_relaxed); }

void runTeam(int64_t tasks, void (*task)(const void* context, int64_t i), const void* context) {
  if (!inTask && Team::instance().run(tasks, numThreads(), task, context)) return;
  for (int64_t i = 0; i < tasks; ++i) task(context, i);
}

}  // namespace viaduct::cpu
