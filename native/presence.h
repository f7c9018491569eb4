// Members of a store show one another that they live, out of band: each asks the server, every while, who has not been heard of.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace viaduct {

/// A member of whom the store has not heard.
struct Silence {
  std::string member;
  int64_t ms = 0;
  /// Its connection is closed, and it did not take its leave.
  bool gone = false;
};

/// Shows from its construction on that `member` is there, on a thread of its own: also while JavaScript is busy, not while the
/// process is stopped. Time in which the process or the server had no turn makes nobody silent.
class Presence {
 public:
  struct State {
    /// Since the server's last answer.
    int64_t unansweredMs = 0;
    /// Members that were silent for `leastMs` or are gone, as the server last said.
    std::vector<Silence> silent;
  };

  Presence(std::string host, int port, std::string jobId, std::string member, int64_t periodMs, int64_t leastMs);
  /// Ends without a word: the others see it gone.
  ~Presence();
  State state() const;
  /// Takes its leave, so that nobody misses it; waits a short while for the server to know.
  void leave();

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace viaduct
