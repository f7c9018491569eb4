// Environment: devices, streams, events, promises and the pool. See env.h for what runs on which thread.
#include "env.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <set>

namespace viaduct::binding {

namespace {

constexpr size_t kMaxPool = 64;

/// What all environments of the process share. Never destroyed: streams may still run while the process exits.
struct Process {
  std::mutex mutex;
  std::vector<Backend*> devices;
  std::vector<std::string> kinds;
  std::set<Stream*> streams;
  std::atomic<int64_t> nextStream{1};
};

/// process.exit() runs no environment's teardown: stop the streams before static objects of the libraries go.
void stopStreamsAtExit();

Process& process() {
  static Process* p = [] {
    std::atexit(stopStreamsAtExit);
    return new Process();
  }();
  return *p;
}

void stopStreamsAtExit() {
  Process& p = process();
  std::lock_guard<std::mutex> lock(p.mutex);
  const auto closing = std::make_exception_ptr(Error("ERR_ABORTED", "exit", "the process exits"));
  std::vector<std::shared_ptr<Event>> ends;
  for (Stream* stream : p.streams) {
    stream->fail(closing);
    ends.push_back(stream->record());
  }
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(2);
  for (const auto& end : ends) {
    while (!end->done() && std::chrono::steady_clock::now() < until) {
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  }
}

}  // namespace

struct Deferred::State {
  Env* env = nullptr;
  napi_deferred deferred = nullptr;
  std::atomic<bool> settled{false};

  void settle(bool ok, std::function<napi_value(Env&)> make) {
    if (settled.exchange(true)) return;
    env->post([d = deferred, ok, make = std::move(make)](Env& e) { e.settle(d, ok, make(e)); });
  }
  ~State() {
    if (settled.load()) return;
    settle(false, [](Env& e) {
      return e.toJsError(std::make_exception_ptr(Error("ERR_ABORTED", "promise", "the work behind it was dropped")));
    });
  }
};

void Deferred::resolve(Value value) const {
  state_->settle(true, [value = std::move(value)](Env& e) { return value.toJs(e.raw()); });
}

void Deferred::reject(std::exception_ptr error) const {
  state_->settle(false, [error = std::move(error)](Env& e) { return e.toJsError(error); });
}

Env::Env(napi_env env) : raw_(env) {
  napi_value name = Value("viaduct").toJs(env);
  napi_create_threadsafe_function(env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, this, &Env::deliver, &tsfn_);
  napi_unref_threadsafe_function(env, tsfn_);
  napi_set_instance_data(env, this, nullptr, nullptr);
  napi_add_env_cleanup_hook(
      env, [](void* self) { delete static_cast<Env*>(self); }, this);
}

Env::~Env() { close(); }

Env& Env::of(napi_env env) {
  void* data = nullptr;
  napi_get_instance_data(env, &data);
  return *static_cast<Env*>(data);
}

void Env::close() {
  for (auto& part : parts_) part.close();
  const auto closing = std::make_exception_ptr(Error("ERR_ABORTED", "environment", "the JavaScript environment ends"));
  for (auto& entry : streams_) {
    if (entry.stream) entry.stream->fail(closing);
  }
  for (auto& entry : streams_) {
    if (entry.stream) entry.stream->drain();
  }
  std::deque<std::function<void()>> dropped;
  {
    std::lock_guard<std::mutex> lock(poolMutex_);
    poolStopping_ = true;
    dropped.swap(poolQueue_);
  }
  poolWork_.notify_all();
  for (auto& thread : pool_) thread.join();
  dropped.clear();
  {
    std::lock_guard<std::mutex> lock(process().mutex);
    for (auto& entry : streams_) process().streams.erase(entry.stream.get());
  }
  while (!parts_.empty()) parts_.pop_back();
  events_.clear();
  slots = SlotTable();
  streams_.clear();
  if (errorFactory_ != nullptr) napi_delete_reference(raw_, errorFactory_);
  napi_release_threadsafe_function(tsfn_, napi_tsfn_abort);
}

int64_t Env::openDevice(const std::string& name, const std::function<std::unique_ptr<Backend>()>& make) {
  Process& p = process();
  std::lock_guard<std::mutex> lock(p.mutex);
  auto found = std::find(p.kinds.begin(), p.kinds.end(), name);
  if (found == p.kinds.end()) {
    p.devices.push_back(make().release());
    p.kinds.push_back(name);
    found = p.kinds.end() - 1;
  }
  const int64_t index = found - p.kinds.begin();
  if (std::find(opened_.begin(), opened_.end(), index) == opened_.end()) opened_.push_back(index);
  return index;
}

Backend& Env::device(int64_t index) {
  VIADUCT_CHECK(std::find(opened_.begin(), opened_.end(), index) != opened_.end(), "ERR_HANDLE", "device",
                "expected an open device, got index " + std::to_string(index));
  Process& p = process();
  std::lock_guard<std::mutex> lock(p.mutex);
  return *p.devices[static_cast<size_t>(index)];
}

int64_t Env::createStream(int64_t index) {
  Backend& backend = device(index);
  std::shared_ptr<Stream> stream = backend.createStream(process().nextStream.fetch_add(1));
  for (const auto& hook : failureHooks_) stream->onFailure(hook);
  {
    std::lock_guard<std::mutex> lock(process().mutex);
    process().streams.insert(stream.get());
  }
  streams_.push_back({std::move(stream), &backend});
  return static_cast<int64_t>(streams_.size());
}

void Env::destroyStream(int64_t id) {
  StreamEntry& entry = stream(id);
  entry.stream->drain();
  std::lock_guard<std::mutex> lock(process().mutex);
  process().streams.erase(entry.stream.get());
  entry.stream.reset();
}

StreamEntry& Env::stream(int64_t id) {
  const auto index = static_cast<size_t>(id - 1);
  if (index >= streams_.size() || streams_[index].stream == nullptr) {
    throw Error("ERR_HANDLE", "stream", "expected a live stream, got id " + std::to_string(id));
  }
  return streams_[index];
}

Backend& Env::backendOf(const Stream& stream) {
  for (StreamEntry& entry : streams_) {
    if (entry.stream.get() == &stream) return *entry.backend;
  }
  throw Error("ERR_HANDLE", "stream", "expected a stream of this environment");
}

int64_t Env::addEvent(std::shared_ptr<Event> event) {
  if (freeEvents_.empty()) {
    events_.push_back(std::move(event));
    return static_cast<int64_t>(events_.size());
  }
  const int64_t id = freeEvents_.back();
  freeEvents_.pop_back();
  events_[static_cast<size_t>(id - 1)] = std::move(event);
  return id;
}

std::shared_ptr<Event> Env::event(int64_t id) {
  const auto index = static_cast<size_t>(id - 1);
  if (index >= events_.size() || events_[index] == nullptr) {
    throw Error("ERR_HANDLE", "event", "expected a live event, got id " + std::to_string(id));
  }
  return events_[index];
}

void Env::destroyEvent(int64_t id) {
  event(id);
  events_[static_cast<size_t>(id - 1)].reset();
  freeEvents_.push_back(id);
}

Deferred Env::defer() {
  Deferred d;
  d.state_ = std::make_shared<Deferred::State>();
  d.state_->env = this;
  napi_create_promise(raw_, &d.state_->deferred, &d.promise_);
  if (pending_++ == 0) napi_ref_threadsafe_function(raw_, tsfn_);
  return d;
}

void Env::settle(napi_deferred deferred, bool ok, napi_value value) {
  if (ok) {
    napi_resolve_deferred(raw_, deferred, value);
  } else {
    napi_reject_deferred(raw_, deferred, value);
  }
  if (--pending_ == 0) napi_unref_threadsafe_function(raw_, tsfn_);
}

void Env::post(std::function<void(Env&)> task) {
  auto* data = new std::function<void(Env&)>(std::move(task));
  if (napi_call_threadsafe_function(tsfn_, data, napi_tsfn_nonblocking) != napi_ok) delete data;
}

void Env::deliver(napi_env env, napi_value, void* context, void* data) {
  std::unique_ptr<std::function<void(Env&)>> task(static_cast<std::function<void(Env&)>*>(data));
  if (env != nullptr) (*task)(*static_cast<Env*>(context));
}

void Env::runBlocking(std::function<void()> work) {
  {
    std::lock_guard<std::mutex> lock(poolMutex_);
    poolQueue_.push_back(std::move(work));
    if (poolIdle_ < poolQueue_.size() && pool_.size() < kMaxPool) pool_.emplace_back([this] { poolLoop(); });
  }
  poolWork_.notify_one();
}

void Env::poolLoop() {
  std::unique_lock<std::mutex> lock(poolMutex_);
  for (;;) {
    poolIdle_ += 1;
    poolWork_.wait(lock, [&] { return poolStopping_ || !poolQueue_.empty(); });
    poolIdle_ -= 1;
    if (poolStopping_) return;
    std::function<void()> work = std::move(poolQueue_.front());
    poolQueue_.pop_front();
    lock.unlock();
    work();
    work = nullptr;
    lock.lock();
  }
}

void Env::onStreamFailure(std::function<void(std::exception_ptr)> hook) {
  for (auto& entry : streams_) {
    if (entry.stream) entry.stream->onFailure(hook);
  }
  failureHooks_.push_back(std::move(hook));
}

napi_value Env::toJsError(std::exception_ptr failure) {
  std::string code = "ERR_NATIVE", where = "native", message;
  try {
    std::rethrow_exception(failure);
  } catch (const Error& e) {
    code = e.code;
    where = e.where;
    message = e.what();
    const std::string head = "[" + where + "] ";
    if (message.rfind(head, 0) == 0) message.erase(0, head.size());
  } catch (const std::bad_alloc&) {
    code = "ERR_OUT_OF_MEMORY";
    message = "expected memory for bookkeeping, got none";
  } catch (const std::exception& e) {
    message = e.what();
  } catch (...) {
    message = "something unknown was thrown";
  }
  napi_value error = nullptr;
  if (errorFactory_ != nullptr) {
    napi_value factory = nullptr, undefined = nullptr;
    napi_get_reference_value(raw_, errorFactory_, &factory);
    napi_get_undefined(raw_, &undefined);
    napi_value args[] = {Value(code).toJs(raw_), Value(where).toJs(raw_), Value(message).toJs(raw_)};
    if (factory != nullptr && napi_call_function(raw_, undefined, factory, 3, args, &error) == napi_ok) return error;
    napi_value thrown = nullptr;
    napi_get_and_clear_last_exception(raw_, &thrown);  // the factory failed: a plain error says as much
  }
  napi_create_error(raw_, Value(code).toJs(raw_), Value("[" + where + "] " + message).toJs(raw_), &error);
  return error;
}

void Env::setErrorFactory(napi_value factory) {
  if (errorFactory_ != nullptr) napi_delete_reference(raw_, errorFactory_);
  errorFactory_ = nullptr;
  napi_create_reference(raw_, factory, 1, &errorFactory_);
}

}  // namespace viaduct::binding
