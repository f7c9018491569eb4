// One detached thread a presence. It asks and waits for answers in turns of one period; what fails costs its turn and no more.
#include "presence.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "errors.h"
#include "tcp_store.h"

namespace viaduct {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using store::Bytes;

/// A connection without an answer for so long is given up: after a cut the system tries an old one ever more seldom.
constexpr auto kPatience = milliseconds(4000);
/// The rest of an answer that has begun to come.
constexpr auto kRest = milliseconds(2000);
constexpr auto kFarewell = milliseconds(300);

milliseconds since(Clock::time_point begin) { return std::chrono::duration_cast<milliseconds>(Clock::now() - begin); }

}  // namespace

struct Presence::Impl {
  std::string host, jobId, member;
  int port = 0;
  milliseconds period{0};
  uint32_t leastMs = 0;

  std::mutex mutex;
  std::condition_variable changed;
  bool ending = false, polite = false, over = false;
  State state;

  void run();
  /// One turn: connects where that is needed, asks, and reads the answer when one comes until `until`.
  bool turn(Socket& socket, bool& asked, Clock::time_point until);
};

bool Presence::Impl::turn(Socket& socket, bool& asked, Clock::time_point until) {
  if (!socket) {
    socket = store::openConnection(host, port, jobId, until);
    asked = false;
  }
  if (!asked) {
    Bytes least;
    store::append32(least, leastMs);
    const Bytes question = store::request(store::kBeat, member, least);
    socket.send(question.data(), question.size(), until);
    asked = true;
  }
  if (!socket.readable(until)) return false;
  const auto [status, body] = store::receiveAnswer(socket, Clock::now() + kRest);
  asked = false;
  if (status != store::kOk) return false;
  std::vector<Silence> silent;
  for (size_t at = 0; body.size() - at >= 9;) {
    Silence one;
    one.ms = store::read32(&body[at]);
    one.gone = body[at + 4] != 0;
    const size_t n = store::read32(&body[at + 5]);
    if (n > body.size() - at - 9) break;
    one.member.assign(body.begin() + static_cast<ptrdiff_t>(at + 9), body.begin() + static_cast<ptrdiff_t>(at + 9 + n));
    at += 9 + n;
    silent.push_back(std::move(one));
  }
  std::lock_guard<std::mutex> lock(mutex);
  state.silent = std::move(silent);
  return true;
}

void Presence::Impl::run() {
  Socket socket;
  bool asked = false;
  milliseconds unheard{0};  // on this connection
  std::unique_lock<std::mutex> lock(mutex);
  while (!ending) {
    lock.unlock();
    const auto begin = Clock::now();
    bool answered = false;
    try {
      answered = turn(socket, asked, begin + period);
    } catch (const std::exception&) {
      socket.close();
    }
    // A turn that took long is one in which this process was stopped.
    const auto lasted = std::clamp(since(begin), period, 4 * period);
    unheard = answered ? milliseconds(0) : unheard + lasted;
    if (unheard >= kPatience) {
      socket.close();
      unheard = milliseconds(0);
    }
    lock.lock();
    state.unansweredMs = answered ? 0 : state.unansweredMs + lasted.count();
    changed.wait_until(lock, begin + period, [this] { return ending; });
  }
  if (polite && socket) {
    lock.unlock();
    try {
      const auto until = Clock::now() + kFarewell;
      const Bytes farewell = store::request(store::kLeave, member, {});
      socket.send(farewell.data(), farewell.size(), until);
      if (asked) store::receiveAnswer(socket, until);
      store::receiveAnswer(socket, until);
    } catch (const std::exception&) {
      // Then it is missed.
    }
    lock.lock();
  }
  socket.close();
  over = true;
  changed.notify_all();
}

Presence::Presence(std::string host, int port, std::string jobId, std::string member, int64_t periodMs, int64_t leastMs)
    : impl_(std::make_shared<Impl>()) {
  VIADUCT_CHECK(!member.empty() && member.size() <= store::kMostMember, "ERR_USAGE", "presence",
                "expected a member's name of 1 to 256 bytes");
  impl_->host = std::move(host);
  impl_->port = port;
  impl_->jobId = std::move(jobId);
  impl_->member = std::move(member);
  impl_->period = milliseconds(std::max<int64_t>(1, periodMs));
  impl_->leastMs = static_cast<uint32_t>(std::clamp<int64_t>(leastMs, 0, UINT32_MAX));
  // Signals are for the threads that wait for them.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread([impl = impl_] { impl->run(); }).detach();
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Presence::~Presence() {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->ending = true;
  impl_->changed.notify_all();
}

Presence::State Presence::state() const {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  return impl_->state;
}

void Presence::leave() {
  std::unique_lock<std::mutex> lock(impl_->mutex);
  impl_->ending = impl_->polite = true;
  impl_->changed.notify_all();
  impl_->changed.wait_for(lock, 2 * kFarewell, [this] { return impl_->over; });
}

}  // namespace viaduct
