// A stream with a worker thread that runs commands in order from a bounded queue, and the events that mark its points. A CPU
// stream is this; a device's stream derives from it: its commands start work there. Rules of poison and order stand in
// stream.h. A failure travels with events: a stream that waits for a poisoned one is poisoned too, because what it would
// read was never computed.
#pragma once

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "stream.h"

namespace viaduct {

/// Commands that may wait; a full queue blocks its caller until half is free.
constexpr uint64_t kQueueBound = 4096;

/// What a device adds around commands, on the worker's thread.
struct WorkerHooks {
  std::function<void()> begin;                 // first on the worker
  std::function<void(const char* op)> before;  // before a command, while times are taken
  std::function<void(const char* op)> after;   // behind it
};

class WorkerStream : public Stream {
 public:
  /// `ended` runs when the worker has stopped.
  explicit WorkerStream(int64_t id, std::function<void(WorkerStream*)> ended = nullptr, WorkerHooks hooks = {});
  ~WorkerStream() override;

  std::shared_ptr<Event> record() override;
  uint64_t position() const override;
  bool isBehind(const Stream& other, uint64_t position) const override;
  void waitFor(std::shared_ptr<Event> event) override;
  void drain() override;
  void notify(std::function<void(std::exception_ptr)> done) override;
  std::exception_ptr error() const override;
  void fail(std::exception_ptr error) override;
  void reset() override;
  void onFailure(std::function<void(std::exception_ptr)> hook) override;
  void setPlace(std::shared_ptr<const std::string> place) override;
  void startProfile() override;
  std::vector<OpTime> endProfile() override;
  void startTrace() override;
  std::vector<Span> endTrace() override;
  int64_t id() const override { return id_; }
  /// Whether the caller is some stream's worker.
  static bool onWorker();

 protected:
  /// Runs what is queued, then ends the worker. A class that derives calls it first in its destructor: commands use its parts.
  void stop();
  /// A command that runs on a poisoned stream too. It must not throw.
  template <typename F>
  void pushAlways(const char* op, F run) {
    push(op, commandKind<F>, &run, true);
  }
  /// The place that holds for the command that runs; on the worker only.
  std::string place() const;
  /// Adds a time that was measured elsewhere to the profile.
  void addTime(const char* op, double seconds);
  /// What is enqueued from here on runs behind the event of another stream's queue: for isBehind().
  void noteWait(const std::shared_ptr<Event>& event);

 private:
  struct State;  // shared with events, which may outlive the stream
  struct WorkerEvent;
  class Queue;

  void append(const char* op, const CommandKind& kind, void* command) override;
  /// `always`: a command that runs on a poisoned stream too.
  void push(const char* op, const CommandKind& kind, void* command, bool always);
  static void run(State& state);

  /// Up to where this stream has waited for another one.
  struct Waited {
    std::weak_ptr<State> other;
    uint64_t point = 0;
  };
  mutable std::mutex waitedMutex_;
  std::map<int64_t, Waited> waited_;  // by the other one's id

  const int64_t id_;
  std::function<void(WorkerStream*)> ended_;
  std::shared_ptr<State> state_;
  std::thread worker_;
};

}  // namespace viaduct
