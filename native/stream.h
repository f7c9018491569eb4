// Streams and events: order of execution. A CPU stream is a worker thread with a bounded queue; a device stream maps to the
// device's own. Ops check their arguments on the caller's thread, then enqueue. Nothing here knows tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

namespace viaduct {

/// Time that a stream spent in commands of one name.
struct OpTime {
  std::string op;
  int64_t count = 0;
  double seconds = 0;
};

/// A command's time on the machine's steady clock, in seconds: the same for all streams and processes of a host.
struct Span {
  std::string op;
  double start = 0;
  double end = 0;
};

constexpr size_t kMaxCommandBytes = size_t{16} << 10;

/// How a queue handles a command of some type: it moves it into memory of its own, so that none is allocated for a command.
struct CommandKind {
  size_t size;
  void (*move)(void* to, void* from);  // constructs at `to`, on a boundary of max_align_t
  void (*run)(void* command);
  void (*destroy)(void* command);
};

template <typename F>
inline constexpr CommandKind commandKind{
    sizeof(F),
    [](void* to, void* from) { new (to) F(std::move(*static_cast<F*>(from))); },
    [](void* command) { (*static_cast<F*>(command))(); },
    [](void* command) { static_cast<F*>(command)->~F(); },
};

/// Marks a point of a stream. Copyable; cheap. wait() from another stream orders that stream after the point.
class Event {
 public:
  virtual ~Event() = default;
  /// True when the stream has passed the point (also after a failure: the point is passed, the stream is poisoned).
  virtual bool done() const = 0;
  /// Blocks the calling thread until done.
  virtual void wait() = 0;
  /// The failure of the event's stream, or null: what its commands should have made was not made.
  virtual std::exception_ptr failure() const { return nullptr; }
};

class Stream {
 public:
  virtual ~Stream() = default;

  /// Appends a command. `op` must be a string literal; it names the command in errors. Blocks while the queue is full
  /// (run-ahead is bounded). On a poisoned stream the command is dropped. Called from the JS thread or a worker.
  template <typename F>
  void enqueue(const char* op, F run) {
    static_assert(alignof(F) <= alignof(std::max_align_t) && sizeof(F) <= kMaxCommandBytes);
    append(op, commandKind<F>, &run);
  }

  /// A point after all that was enqueued so far.
  virtual std::shared_ptr<Event> record() = 0;
  /// Commands enqueued so far.
  virtual uint64_t position() const = 0;
  /// Whether what is enqueued here from now on runs after the first `position` commands of `other`, because this stream waits for an
  /// event there. False where that is not known. From any thread.
  virtual bool isBehind(const Stream& other, uint64_t position) const = 0;
  /// Later commands of this stream start after the event.
  virtual void waitFor(std::shared_ptr<Event> event) = 0;
  /// Blocks the caller until the queue is empty. Never throws; see error().
  virtual void drain() = 0;

  /// Runs `done` on the stream's thread after all that was enqueued so far; it gets the poison, or null.
  /// It runs on a poisoned stream too: this is how awaits are rejected.
  virtual void notify(std::function<void(std::exception_ptr)> done) = 0;

  /// The first failure of this stream, or null. A poisoned stream skips commands until reset().
  virtual std::exception_ptr error() const = 0;
  /// Poisons from any thread (an aborted communicator does this).
  virtual void fail(std::exception_ptr error) = 0;
  virtual void reset() = 0;
  /// `hook` runs once for each poisoning, on the thread that noticed it; aborting communicators hangs on this.
  virtual void onFailure(std::function<void(std::exception_ptr)> hook) { (void)hook; }

  /// A place in the program ("decoder.layers.3.mlp, step 12") that errors of later commands carry.
  virtual void setPlace(std::shared_ptr<const std::string> place) = 0;

  /// Times commands from here on, by name, from zero.
  virtual void startProfile() {}
  /// What was timed since startProfile(), slowest first; ends it. Wait for the stream before.
  virtual std::vector<OpTime> endProfile() { return {}; }
  /// Notes each command's time from here on, of the first 100,000. Nothing where the device takes the times.
  virtual void startTrace() {}
  /// What was noted since startTrace(), in order; ends it. Wait for the stream before.
  virtual std::vector<Span> endTrace() { return {}; }

  virtual int64_t id() const = 0;

 protected:
  /// enqueue() of a command that is moved from.
  virtual void append(const char* op, const CommandKind& kind, void* command) = 0;
};

}  // namespace viaduct
