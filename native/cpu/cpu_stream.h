// A CPU stream: one worker thread that runs commands in order from a bounded queue, and the events that mark its points.
// Rules of poison and order stand in ../stream.h. A failure travels with events: a stream that waits for a poisoned one is
// poisoned too, because what it would read was never computed.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../stream.h"

namespace viaduct::cpu {

/// Commands that may wait; a full queue blocks its caller until half is free.
constexpr uint64_t kQueueBound = 4096;

class CpuStream final : public Stream {
 public:
  /// `ended` runs when the worker has stopped.
  explicit CpuStream(int64_t id, std::function<void(CpuStream*)> ended = nullptr);
  ~CpuStream() override;

  std::shared_ptr<Event> record() override;
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
  int64_t id() const override { return id_; }
  /// Whether the caller is some CPU stream's worker.
  static bool onWorker();

 private:
  struct State;  // shared with events, which may outlive the stream
  struct CpuEvent;
  class Queue;

  void append(const char* op, const CommandKind& kind, void* command) override;
  /// `always`: a command that runs on a poisoned stream too.
  void push(const char* op, const CommandKind& kind, void* command, bool always);
  template <typename F>
  void pushAlways(const char* op, F run) {
    push(op, commandKind<F>, &run, true);
  }
  static void run(State& state);

  const int64_t id_;
  std::function<void(CpuStream*)> ended_;
  std::shared_ptr<State> state_;
  std::thread worker_;
};

}  // namespace viaduct::cpu
