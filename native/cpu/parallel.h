// Threads of the CPU kernels: one OpenMP team, entered by the stream's worker. Work is cut by shape alone, so results do
// not depend on the number of threads.
#pragma once

#include <cstdint>

namespace viaduct::cpu {

/// Threads a kernel may use; at least 1.
int numThreads();
void setNumThreads(int n);

/// Calls f(i) for i in [0, tasks), each once, in any order, on any thread of the team. f must not throw.
template <typename F>
void parallelFor(int64_t tasks, F&& f) {
  const int threads = numThreads();
  if (tasks <= 1 || threads <= 1) {
    for (int64_t i = 0; i < tasks; ++i) f(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < tasks; ++i) f(i);
}

/// Cuts [0, n) into chunks of `grain` and calls f(begin, end) for each.
template <typename F>
void parallelChunks(int64_t n, int64_t grain, F&& f) {
  const int64_t tasks = (n + grain - 1) / grain;
  parallelFor(tasks, [&](int64_t t) {
    const int64_t begin = t * grain;
    f(begin, begin + grain < n ? begin + grain : n);
  });
}

}  // namespace viaduct::cpu
