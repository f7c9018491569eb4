// Threads of the CPU kernels: one team a process, entered by a stream's worker. Work is cut by shape alone, so results do not
// depend on the number of threads. Nobody waits for a thread that has not begun: where others take the cores, who called
// does the work alone.
#pragma once

#include <cstdint>

namespace viaduct::cpu {

/// Threads a kernel may use, the caller's included; at least 1.
int numThreads();
void setNumThreads(int n);

/// Runs task(context, i) for i in [0, tasks) on the caller and the team; returns when all are done. What a task throws is
/// thrown to the caller; tasks that have not begun by then do not run. A call from within a task, or while another thread
/// has the team, runs on the caller alone.
void runTeam(int64_t tasks, void (*task)(const void* context, int64_t i), const void* context);

/// Multiplications below which the caller alone is done before the team has met: about 10 microseconds.
constexpr int64_t kTeamWork = int64_t{1} << 18;

/// Calls f(i) for i in [0, tasks), each once, in any order, on any thread of the team. `work`: multiplications, or what takes
/// as long as one, of all tasks together, where that may be little.
template <typename F>
void parallelFor(int64_t tasks, const F& f, int64_t work = kTeamWork) {
  if (tasks <= 1 || work < kTeamWork || numThreads() <= 1) {
    for (int64_t i = 0; i < tasks; ++i) f(i);
    return;
  }
  runTeam(
      tasks, [](const void* context, int64_t i) { (*static_cast<const F*>(context))(i); }, &f);
}

/// Cuts [0, n) into chunks of `grain` and calls f(begin, end) for each.
template <typename F>
void parallelChunks(int64_t n, int64_t grain, const F& f, int64_t work = kTeamWork) {
  const int64_t tasks = (n + grain - 1) / grain;
  parallelFor(
      tasks,
      [&](int64_t t) {
        const int64_t begin = t * grain;
        f(begin, begin + grain < n ? begin + grain : n);
      },
      work);
}

}  // namespace viaduct::cpu
