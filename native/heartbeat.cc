// One detached thread a process. It knows nothing but its file, so that nothing which fails elsewhere can stop it.
#include "heartbeat.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "errors.h"

namespace viaduct {
namespace {

std::atomic<bool> started{false};

bool touch(const std::string& file) { return utimensat(AT_FDCWD, file.c_str(), nullptr, 0) == 0; }

}  // namespace

void startHeartbeat(const std::string& file, int64_t periodMs) {
  if (started.exchange(true)) return;
  if (!touch(file)) {
    const std::string why = std::strerror(errno);
    started.store(false);
    throw Error("ERR_IO", "startHeartbeat", "expected to touch " + file + ", got " + why);
  }
  const auto period = std::chrono::milliseconds(std::max<int64_t>(1, periodMs));
  // Signals are for the threads that wait for them.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread([file, period] {
    for (;;) {
      std::this_thread::sleep_for(period);
      touch(file);  // without the file nobody looks any more
    }
  }).detach();
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

}  // namespace viaduct
