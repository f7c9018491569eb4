// Rows for streams and events.
#include <time.h>

#include <chrono>
#include <thread>

#include "../cpu/parallel.h"
#include "bind.h"

namespace viaduct::binding {

namespace {

int64_t createStream(Env& env, int64_t device) { return env.createStream(device); }
void destroyStream(Env& env, int64_t id) { env.destroyStream(id); }

Promise syncStream(Env& env, Stream& stream) {
  Deferred deferred = env.defer();
  stream.notify([deferred](std::exception_ptr error) {
    if (error != nullptr) {
      deferred.reject(error);
    } else {
      deferred.resolve(Value());
    }
  });
  return Promise{deferred.promise()};
}

void checkStream(Stream& stream) {
  if (auto error = stream.error()) std::rethrow_exception(error);
}

void resetStream(Stream& stream) { stream.reset(); }

void setPlace(Stream& stream, std::string place) {
  stream.setPlace(std::make_shared<const std::string>(std::move(place)));
}

void startProfile(Stream& stream) { stream.startProfile(); }

Value endProfile(Stream& stream) {
  std::vector<Value> rows;
  for (OpTime& time : stream.endProfile()) {
    rows.push_back(Value(Value::Record{
        {"op", Value(std::move(time.op))}, {"count", Value(time.count)}, {"seconds", Value(time.seconds)}}));
  }
  return Value(std::move(rows));
}

void startTrace(Stream& stream) { stream.startTrace(); }

Value endTrace(Stream& stream) {
  std::vector<Value> rows;
  for (Span& span : stream.endTrace()) {
    rows.push_back(Value(
        Value::Record{{"op", Value(std::move(span.op))}, {"start", Value(span.start)}, {"end", Value(span.end)}}));
  }
  return Value(std::move(rows));
}

int64_t recordEvent(Env& env, Stream& stream) { return env.addEvent(stream.record()); }
void waitEvent(Env& env, Stream& stream, int64_t event) { stream.waitFor(env.event(event)); }
bool eventDone(Env& env, int64_t event) { return env.event(event)->done(); }
void destroyEvent(Env& env, int64_t event) { env.destroyEvent(event); }

/// Fault injection for tests: a command that fails when its turn comes.
void debugFail(Stream& stream, const std::string& message) {
  stream.enqueue("debugFail", [message] { throw Error("ERR_NATIVE", "debugFail", message); });
}

/// Fault injection for tests: a kernel of so many tasks, each of which fails on whatever thread runs it.
void debugFailTasks(Stream& stream, int64_t tasks, const std::string& message) {
  stream.enqueue("debugFailTasks", [tasks, message] {
    cpu::parallelFor(tasks, [&](int64_t) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));  // so that helpers take some
      throw Error("ERR_NATIVE", "debugFailTasks", message);
    });
  });
}

/// For tests of order and back-pressure: a command that takes so long.
void debugDelay(Stream& stream, int64_t microseconds) {
  stream.enqueue("debugDelay",
                 [microseconds] { std::this_thread::sleep_for(std::chrono::microseconds(microseconds)); });
}

/// Processor time of the calling thread: for benchmarks, which must not count what other threads do beside it.
double threadMicroseconds() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) * 1e6 + static_cast<double>(t.tv_nsec) / 1e3;
}

}  // namespace

std::vector<Row> streamRows() {
  return {
      row("createStream", &createStream),     row("destroyStream", &destroyStream),
      row("syncStream", &syncStream),         row("checkStream", &checkStream),
      row("resetStream", &resetStream),       row("setPlace", &setPlace),
      row("recordEvent", &recordEvent),       row("waitEvent", &waitEvent),
      row("eventDone", &eventDone),           row("destroyEvent", &destroyEvent),
      row("debugFail", &debugFail),           row("debugDelay", &debugDelay),
      row("debugFailTasks", &debugFailTasks), row("startProfile", &startProfile),
      row("endProfile", &endProfile),         row("threadMicroseconds", &threadMicroseconds),
      row("startTrace", &startTrace),         row("endTrace", &endTrace),
  };
}

}  // namespace viaduct::binding
