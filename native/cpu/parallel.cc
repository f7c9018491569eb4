// The number of threads a kernel may use. The team itself is OpenMP's; nothing here starts a thread.
#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <thread>

namespace viaduct::cpu {

namespace {

std::atomic<int> threads{0};  // 0: not set, use the machine's

}  // namespace

int numThreads() {
  const int n = threads.load(std::memory_order_relaxed);
  if (n > 0) return n;
  static const int machine = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));  // it reads a file
  return machine;
}

void setNumThreads(int n) { threads.store(std::max(0, n), std::memory_order_relaxed); }

}  // namespace viaduct::cpu
