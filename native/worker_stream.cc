// The worker's loop and its counters: `pushed` and `passed` count items; an event is a value of `passed` to reach.
#include "worker_stream.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "errors.h"

namespace viaduct {

/// Commands in the order of their arrival, one behind the other in blocks that are kept for later ones.
class WorkerStream::Queue {
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

constexpr size_t kMostSpans = 100000;

struct WorkerStream::State {
  explicit State(int64_t id) : id(id) {}

  const int64_t id;
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
  std::atomic<bool> timing{false};  // profiling or tracing
  bool profiling = false;
  bool tracing = false;
  std::map<std::string, OpTime> profile;
  std::vector<Span> trace;
  WorkerHooks around;
  std::thread::id worker;
  bool sleeping = false;
  bool stopping = false;

  void runTimed(const Queue::Item& item) {
    if (around.before) {  // the device takes the time
      around.before(item.op);
      item.kind->run(item.command);
      around.after(item.op);
      return;
    }
    const double start = secondsNow();
    item.kind->run(item.command);
    const double end = secondsNow();
    addTime(item.op, end - start);
    std::lock_guard<std::mutex> lock(mutex);
    if (tracing && trace.size() < kMostSpans) trace.push_back({item.op, start, end});
  }

  static double secondsNow() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }

  void addTime(const char* op, double seconds) {
    std::lock_guard<std::mutex> lock(mutex);
    if (!profiling) return;
    OpTime& time = profile[op];
    time.count += 1;
    time.seconds += seconds;
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

  std::exception_ptr failure() const {
    if (!poisoned.load()) return nullptr;
    std::lock_guard<std::mutex> lock(mutex);
    return error;
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

struct WorkerStream::WorkerEvent final : Event {
  WorkerEvent(std::shared_ptr<State> state, uint64_t point) : state(std::move(state)), point(point) {}
  bool done() const override { return state->passed.load() >= point; }
  void wait() override { state->waitUntilPassed(point); }
  std::exception_ptr failure() const override { return state->failure(); }

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

WorkerStream::WorkerStream(int64_t id, std::function<void(WorkerStream*)> ended, WorkerHooks hooks)
    : id_(id), ended_(std::move(ended)), state_(std::make_shared<State>(id)) {
  state_->around = std::move(hooks);
  worker_ = std::thread([state = state_] { run(*state); });
  state_->worker = worker_.get_id();
}

WorkerStream::~WorkerStream() {
  stop();
  if (ended_) ended_(this);
}

void WorkerStream::stop() {
  if (!worker_.joinable()) return;
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
}

bool WorkerStream::onWorker() { return isWorker; }

void WorkerStream::run(State& state) {
  isWorker = true;
  if (state.around.begin) {
    try {
      state.around.begin();
    } catch (...) {
      state.poison(located(std::current_exception(), "stream", nullptr));
    }
  }
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
          if (state.timing.load(std::memory_order_relaxed)) {
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

void WorkerStream::push(const char* op, const CommandKind& kind, void* command, bool always) {
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

void WorkerStream::append(const char* op, const CommandKind& kind, void* command) {
  if (!state_->poisoned.load(std::memory_order_relaxed)) push(op, kind, command, false);
}

std::shared_ptr<Event> WorkerStream::record() { return std::make_shared<WorkerEvent>(state_, state_->pushed.load()); }

void WorkerStream::waitFor(std::shared_ptr<Event> event) {
  auto* other = dynamic_cast<WorkerEvent*>(event.get());
  if (other != nullptr && other->state == state_) return;  // its own past
  if (!event->done() || event->failure() != nullptr) {
    enqueue("waitEvent", [event, own = state_.get()] {
      event->wait();
      if (const std::exception_ptr error = event->failure()) own->poison(error);
    });
  }
  noteWait(event);
}

void WorkerStream::noteWait(const std::shared_ptr<Event>& event) {
  const auto* other = dynamic_cast<const WorkerEvent*>(event.get());
  if (other == nullptr) return;
  std::lock_guard<std::mutex> lock(waitedMutex_);
  Waited& waited = waited_[other->state->id];
  waited.other = other->state;
  waited.point = std::max(waited.point, other->point);
}

uint64_t WorkerStream::position() const { return state_->pushed.load(); }

bool WorkerStream::isBehind(const Stream& other, uint64_t position) const {
  std::lock_guard<std::mutex> lock(waitedMutex_);
  const auto found = waited_.find(other.id());
  return found != waited_.end() && found->second.point >= position;
}

void WorkerStream::drain() {
  if (std::this_thread::get_id() != state_->worker) state_->waitUntilPassed(state_->pushed.load());
}

void WorkerStream::notify(std::function<void(std::exception_ptr)> done) {
  pushAlways("notify", [done = std::move(done), own = state_.get()] { done(own->failure()); });
}

std::exception_ptr WorkerStream::error() const { return state_->failure(); }

std::string WorkerStream::place() const { return state_->place == nullptr ? "" : *state_->place; }

void WorkerStream::addTime(const char* op, double seconds) { state_->addTime(op, seconds); }

void WorkerStream::fail(std::exception_ptr error) { state_->poison(std::move(error)); }

void WorkerStream::reset() {
  drain();
  // Waits that were skipped: memory may have been given back behind them.
  std::map<int64_t, Waited> waited;
  {
    std::lock_guard<std::mutex> lock(waitedMutex_);
    waited = waited_;
  }
  for (const auto& [_, wait] : waited) {
    if (const auto other = wait.other.lock()) other->waitUntilPassed(wait.point);
  }
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->error = nullptr;
  state_->poisoned.store(false);
}

void WorkerStream::onFailure(std::function<void(std::exception_ptr)> hook) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->hooks.push_back(std::move(hook));
}

void WorkerStream::startProfile() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->profile.clear();
  state_->profiling = true;
  state_->timing.store(true);
}

std::vector<OpTime> WorkerStream::endProfile() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->profiling = false;
  state_->timing.store(state_->tracing);
  std::vector<OpTime> times;
  for (auto& [op, time] : state_->profile) {
    time.op = op;
    times.push_back(std::move(time));
  }
  state_->profile.clear();
  std::sort(times.begin(), times.end(), [](const OpTime& a, const OpTime& b) { return a.seconds > b.seconds; });
  return times;
}

void WorkerStream::startTrace() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->trace.clear();
  if (state_->around.before) return;
  state_->tracing = true;
  state_->timing.store(true);
}

std::vector<Span> WorkerStream::endTrace() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->tracing = false;
  state_->timing.store(state_->profiling);
  return std::exchange(state_->trace, {});
}

void WorkerStream::setPlace(std::shared_ptr<const std::string> place) {
  pushAlways("setPlace", [place = std::move(place), own = state_.get()]() mutable { own->place = std::move(place); });
}

}  // namespace viaduct
