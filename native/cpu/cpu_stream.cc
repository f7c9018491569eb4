// The worker's loop and its counters: `pushed` and `passed` count items; an event is a value of `passed` to reach.
#include "cpu_stream.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "../errors.h"

namespace viaduct::cpu {

/// Commands in the order of their arrival, one behind the other in blocks that are kept for later ones.
class CpuStream::Queue {
 public:
  struct Item {
    const char* op;
    const CommandKind* kind;
    void* command;
    bool always;
  };

  void add(const char* op, const CommandKind& kind, void* command, bool always) {
    const size_t bytes =
        (kind.size + alignof(std::max_align_t) - 1) / alignof(std::max_align_t) * alignof(std::max_align_t);
    if (used_ + bytes > kBlock) {
      block_ += 1;
      used_ = 0;
    }
    if (block_ == blocks_.size()) blocks_.push_back(std::make_unique<Block>());
    void* place = blocks_[block_]->bytes + used_;
    items.push_back({op, &kind, place, always});
    kind.move(place, command);
    used_ += bytes;
  }

  /// Forgets the items, which were destroyed.
  void clear() {
    items.clear();
    block_ = used_ = 0;
  }

  std::vector<Item> items;

 private:
  static constexpr size_t kBlock = 4 * kMaxCommandBytes;
  struct Block {
    alignas(std::max_align_t) std::byte bytes[kBlock];
  };
  std::vector<std::unique_ptr<Block>> blocks_;
  size_t block_ = 0;
  size_t used_ = 0;
};

struct CpuStream::State {
  mutable std::mutex mutex;
  std::condition_variable work;     // the worker sleeps here
  std::condition_variable passing;  // waits for `passed` sleep here
  Queue queue;
  std::shared_ptr<const std::string> place;  // the worker's alone
  std::exception_ptr error;
  std::vector<std::function<void(std::exception_ptr)>> hooks;
  std::atomic<bool> poisoned{false};
  std::atomic<uint64_t> pushed{0};
  std::atomic<uint64_t> passed{0};
  std::atomic<int> waiters{0};
  std::atomic<bool> profiling{false};
  std::map<std::string, OpTime> profile;
  std::thread::id worker;
  bool sleeping = false;
  bool stopping = false;

  void runTimed(const Queue::Item& item) {
    const auto from = std::chrono::steady_clock::now();
    item.kind->run(item.command);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - from;
    std::lock_guard<std::mutex> lock(mutex);
    OpTime& time = profile[item.op];
    time.count += 1;
    time.seconds += took.count();
  }

  void waitUntilPassed(uint64_t point) {
    if (passed.load() >= point) return;
    waiters.fetch_add(1);
    {
      std::unique_lock<std::mutex> lock(mutex);
      passing.wait(lock, [&] { return passed.load() >= point; });
    }
    waiters.fetch_sub(1);
  }

  void pass() {
    passed.fetch_add(1);
    if (waiters.load() == 0) return;
    { std::lock_guard<std::mutex> lock(mutex); }
    passing.notify_all();
  }

  void poison(std::exception_ptr failure) {
    std::vector<std::function<void(std::exception_ptr)>> toCall;
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (error != nullptr) return;
      error = failure;
      poisoned.store(true);
      toCall = hooks;
    }
    for (const auto& hook : toCall) hook(failure);
  }
};

struct CpuStream::CpuEvent final : Event {
  CpuEvent(std::shared_ptr<State> state, uint64_t point) : state(std::move(state)), point(point) {}
  bool done() const override { return state->passed.load() >= point; }
  void wait() override { state->waitUntilPassed(point); }

  std::shared_ptr<State> state;
  const uint64_t point;
};

namespace {

constexpr auto kSpin = std::chrono::microseconds(20);  // a wake-up by futex costs about as much

thread_local bool isWorker = false;

/// The failure as awaits see it: with the op and the place of the command that failed.
std::exception_ptr located(std::exception_ptr failure, const char* op, const std::string* place) {
  const std::string at = place == nullptr || place->empty() ? "" : " (in " + *place + ")";
  try {
    std::rethrow_exception(failure);
  } catch (const Error& e) {
    std::string text = e.what();
    const std::string head = "[" + e.where + "] ";
    if (text.rfind(head, 0) == 0) text.erase(0, head.size());
    const std::string by = e.where == op ? "" : " (by " + std::string(op) + ")";
    return std::make_exception_ptr(Error(e.code, e.where, text + by + at));
  } catch (const std::bad_alloc&) {
    return std::make_exception_ptr(
        Error("ERR_OUT_OF_MEMORY", op, "expected scratch memory, got none: take a smaller batch or model" + at));
  } catch (const std::exception& e) {
    return std::make_exception_ptr(Error("ERR_NATIVE", op, std::string(e.what()) + at));
  } catch (...) {
    return std::make_exception_ptr(Error("ERR_NATIVE", op, "a command threw something unknown" + at));
  }
}

}  // namespace

CpuStream::CpuStream(int64_t id, std::function<void(CpuStream*)> ended)
    : id_(id), ended_(std::move(ended)), state_(std::make_shared<State>()) {
  worker_ = std::thread([state = state_] { run(*state); });
  state_->worker = worker_.get_id();
}

CpuStream::~CpuStream() {
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stopping = true;
  }
  state_->work.notify_all();
  if (std::this_thread::get_id() == worker_.get_id()) {
    worker_.detach();  // the last owner was a command of this stream
  } else {
    worker_.join();
  }
  if (ended_) ended_(this);
}

bool CpuStream::onWorker() { return isWorker; }

void CpuStream::run(State& state) {
  isWorker = true;
  Queue batch;
  for (;;) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    while (state.pushed.load() == state.passed.load() && std::chrono::steady_clock::now() < until) {
      std::this_thread::yield();
    }
    {
      std::unique_lock<std::mutex> lock(state.mutex);
      state.sleeping = true;
      state.work.wait(lock, [&] { return !state.queue.items.empty() || state.stopping; });
      state.sleeping = false;
      if (state.queue.items.empty()) return;
      std::swap(batch, state.queue);
    }
    for (const Queue::Item& item : batch.items) {
      if (item.always) {
        item.kind->run(item.command);
      } else if (!state.poisoned.load()) {
        try {
          if (state.profiling.load(std::memory_order_relaxed)) {
            state.runTimed(item);
          } else {
            item.kind->run(item.command);
          }
        } catch (...) {
          state.poison(located(std::current_exception(), item.op, state.place.get()));
        }
      }
      item.kind->destroy(item.command);  // what the command held goes before its point is passed
      state.pass();
    }
    batch.clear();
  }
}

void CpuStream::push(const char* op, const CommandKind& kind, void* command, bool always) {
  State& state = *state_;
  if (state.pushed.load() - state.passed.load() >= kQueueBound && std::this_thread::get_id() != state.worker) {
    state.waitUntilPassed(state.pushed.load() - kQueueBound / 2);
  }
  bool wake;
  {
    std::lock_guard<std::mutex> lock(state.mutex);
    state.queue.add(op, kind, command, always);
    state.pushed.fetch_add(1);
    wake = state.sleeping;
  }
  if (wake) state.work.notify_one();
}

void CpuStream::append(const char* op, const CommandKind& kind, void* command) {
  if (!state_->poisoned.load(std::memory_order_relaxed)) push(op, kind, command, false);
}

std::shared_ptr<Event> CpuStream::record() { return std::make_shared<CpuEvent>(state_, state_->pushed.load()); }

void CpuStream::waitFor(std::shared_ptr<Event> event) {
  auto* other = dynamic_cast<CpuEvent*>(event.get());
  if (other != nullptr && other->state == state_) return;  // its own past
  if (event->done() && (other == nullptr || !other->state->poisoned.load())) return;
  enqueue("waitEvent", [event = std::move(event), own = state_.get()] {
    event->wait();
    auto* source = dynamic_cast<CpuEvent*>(event.get());
    if (source == nullptr || !source->state->poisoned.load()) return;
    std::exception_ptr error;
    {
      std::lock_guard<std::mutex> lock(source->state->mutex);
      error = source->state->error;
    }
    if (error != nullptr) own->poison(error);
  });
}

void CpuStream::drain() {
  if (std::this_thread::get_id() != state_->worker) state_->waitUntilPassed(state_->pushed.load());
}

void CpuStream::notify(std::function<void(std::exception_ptr)> done) {
  pushAlways("notify", [done = std::move(done), own = state_.get()] {
    std::exception_ptr error;
    {
      std::lock_guard<std::mutex> lock(own->mutex);
      error = own->error;
    }
    done(error);
  });
}

std::exception_ptr CpuStream::error() const {
  if (!state_->poisoned.load()) return nullptr;
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->error;
}

void CpuStream::fail(std::exception_ptr error) { state_->poison(std::move(error)); }

void CpuStream::reset() {
  drain();
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->error = nullptr;
  state_->poisoned.store(false);
}

void CpuStream::onFailure(std::function<void(std::exception_ptr)> hook) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->hooks.push_back(std::move(hook));
}

void CpuStream::startProfile() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->profile.clear();
  state_->profiling.store(true);
}

std::vector<OpTime> CpuStream::endProfile() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->profiling.store(false);
  std::vector<OpTime> times;
  for (auto& [op, time] : state_->profile) {
    time.op = op;
    times.push_back(std::move(time));
  }
  state_->profile.clear();
  std::sort(times.begin(), times.end(), [](const OpTime& a, const OpTime& b) { return a.seconds > b.seconds; });
  return times;
}

void CpuStream::setPlace(std::shared_ptr<const std::string> place) {
  pushAlways("setPlace", [place = std::move(place), own = state_.get()]() mutable { own->place = std::move(place); });
}

}  // namespace viaduct::cpu
