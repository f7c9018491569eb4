// Memory for bytes on their way between files, in pieces of one size that later calls reuse: fresh memory would cost more
// than the read. A call holds at most two pieces; how many calls run at once is limited in lib/io/blocks.ts.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "../errors.h"

namespace viaduct::io {

constexpr int64_t kScratchBytes = int64_t{1} << 19;

/// One piece.
class Scratch {
 public:
  Scratch() {
    {
      std::lock_guard<std::mutex> lock(pool().mutex);
      if (!pool().idle.empty()) {
        memory_ = std::move(pool().idle.back());
        pool().idle.pop_back();
        return;
      }
    }
    memory_.reset(static_cast<char*>(std::malloc(kScratchBytes)));
    VIADUCT_CHECK(memory_ != nullptr, "ERR_OUT_OF_MEMORY", "file", "expected 512 KiB of scratch memory, got none");
  }
  ~Scratch() {
    std::lock_guard<std::mutex> lock(pool().mutex);
    pool().idle.push_back(std::move(memory_));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  using Memory = std::unique_ptr<char, Free>;
  struct Pool {
    std::mutex mutex;
    std::vector<Memory> idle;
  };
  static Pool& pool() {
    static Pool* pool = new Pool();  // outlives threads that still read at exit
    return *pool;
  }
  Memory memory_;
};

}  // namespace viaduct::io
