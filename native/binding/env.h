// What one JavaScript environment (main thread or worker_thread) owns: slots, streams, events, a pool for blocking work, and
// the one queue through which other threads settle promises. Rows are written against bind.h, which includes this file.
// Everything here is called on the environment's own thread, except post(), Deferred::resolve() and Deferred::reject().
#pragma once

#include <node_api.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <typeindex>
#include <utility>
#include <vector>

#include "../backend.h"
#include "../slots.h"

namespace viaduct::binding {

/// A native result on its way to JavaScript. Numbers are doubles; bytes become a Uint8Array; a record becomes an object.
class Value {
 public:
  using Record = std::vector<std::pair<std::string, Value>>;
  using Make = std::function<napi_value(napi_env)>;
  Value() = default;  // undefined
  Value(bool v);
  Value(double v);
  Value(int v) : Value(static_cast<double>(v)) {}
  Value(int64_t v) : Value(static_cast<double>(v)) {}
  Value(uint64_t v) : Value(static_cast<double>(v)) {}
  Value(const char* v) : Value(std::string(v)) {}
  Value(std::string v);
  Value(std::vector<uint8_t> v);
  Value(std::vector<int64_t> v);
  Value(std::vector<std::string> v);
  Value(std::vector<Value> v);
  Value(Record v);
  /// Anything else: `make` runs on the JavaScript thread.
  Value(Make make) : make_(std::move(make)) {}
  napi_value toJs(napi_env env) const;

 private:
  Make make_;
};

class Env;

/// One promise, to be settled once, from any thread. Copyable. Dropped without being settled, it rejects with ERR_ABORTED.
class Deferred {
 public:
  void resolve(Value value) const;
  void reject(std::exception_ptr error) const;
  napi_value promise() const { return promise_; }  // only within the call that made it

 private:
  friend class Env;
  struct State;
  std::shared_ptr<State> state_;
  napi_value promise_ = nullptr;
};

/// Return type of a row that answers with a promise.
struct Promise {
  napi_value value = nullptr;
};

struct StreamEntry {
  std::shared_ptr<Stream> stream;
  Backend* backend = nullptr;
};

class Env {
 public:
  explicit Env(napi_env env);
  ~Env();
  static Env& of(napi_env env);
  napi_env raw() const { return raw_; }

  SlotTable slots;

  /// Opens (once a process) the backend of this name, which `make` makes; returns its index.
  int64_t openDevice(const std::string& name, const std::function<std::unique_ptr<Backend>()>& make);
  Backend& device(int64_t index);
  int64_t createStream(int64_t device);
  void destroyStream(int64_t id);
  StreamEntry& stream(int64_t id);
  Backend& backendOf(const Stream& stream);
  int64_t addEvent(std::shared_ptr<Event> event);
  std::shared_ptr<Event> event(int64_t id);
  void destroyEvent(int64_t id);

  Deferred defer();
  /// Runs `task` on this environment's thread; from any thread. A task holds the process alive only through promises.
  void post(std::function<void(Env&)> task);
  /// Runs blocking work on a pool thread. Idle threads are reused, else one starts (at most 64), so that waiting work never
  /// starves other work; who wants less parallelism limits it in JavaScript. `work` must not throw: see async() in bind.h.
  void runBlocking(std::function<void()> work);

  /// The one T of this environment, default-constructed at first use: where a row file keeps its tables. At teardown
  /// T::close() runs first (unblock whatever waits: abort communicators, close sockets), then streams and pool end, then ~T.
  template <typename T>
  T& part() {
    for (auto& p : parts_) {
      if (p.type == std::type_index(typeid(T))) return *static_cast<T*>(p.object.get());
    }
    auto object = std::make_shared<T>();
    T* raw = object.get();
    parts_.push_back({std::type_index(typeid(T)), std::move(object), [raw] { raw->close(); }});
    return *raw;
  }
  /// `hook` runs on the failing thread whenever a stream of this environment, present or future, is poisoned.
  void onStreamFailure(std::function<void(std::exception_ptr)> hook);

  /// The JavaScript error of a native failure: what the factory of lib/addon/load.ts makes, else a plain Error with `code`.
  napi_value toJsError(std::exception_ptr error);
  void setErrorFactory(napi_value factory);

 private:
  friend class Deferred;
  struct Part {
    std::type_index type;
    std::shared_ptr<void> object;
    std::function<void()> close;
  };
  static void deliver(napi_env env, napi_value, void* context, void* data);
  void settle(napi_deferred deferred, bool ok, napi_value value);
  void poolLoop();
  void close();

  napi_env raw_;
  napi_threadsafe_function tsfn_ = nullptr;
  napi_ref errorFactory_ = nullptr;
  int64_t pending_ = 0;
  std::vector<int64_t> opened_;
  std::vector<StreamEntry> streams_;
  std::vector<std::shared_ptr<Event>> events_;
  std::vector<int64_t> freeEvents_;
  std::vector<Part> parts_;
  std::vector<std::function<void(std::exception_ptr)>> failureHooks_;

  std::mutex poolMutex_;
  std::condition_variable poolWork_;
  std::deque<std::function<void()>> poolQueue_;
  std::vector<std::thread> pool_;
  size_t poolIdle_ = 0;
  bool poolStopping_ = false;
};

}  // namespace viaduct::binding
