// What is known of every byte that kernels may touch: whether it may be used, whether it was written, and by which threads
// since when. From it come the errors on accesses: out of bounds, not initialised, a race. Used by one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace viaduct::emulation {

/// Who accesses, and what came before it in the order that barriers make.
struct Accessor {
  uint32_t block = 0;       // linear
  uint16_t thread = 0;      // linear in the block
  uint64_t blockBegan = 0;  // times
  uint64_t barrier = 0;     // last barrier of the block
  uint64_t warpSync = 0;    // last __syncwarp of the warp
};

/// The emulated GPU's memory: a range of addresses (runtime.cc commits them).
struct Arena {
  char* base = nullptr;
  size_t bytes = 0;
};

class Shadow {
 public:
  void setArena(Arena arena);
  const Arena& arena() const { return arena_; }
  /// See cuda_runtime.h.
  void allocated(char* data, size_t bytes);
  /// Whether host code may copy from or to these bytes of the arena.
  bool usable(const void* data, size_t bytes) const;

  void beginLaunch(uint64_t blocks);
  void setStatic(char* base, size_t bytes);
  void setDynamic(char* base, size_t bytes, size_t capacity);
  uint64_t tick() { return ++time_; }
  /// What the block has written is there for blocks that come later.
  void fence(uint32_t block) { fences_[block] = ++time_; }

  /// Notes an access. Empty text: all is well, or the memory is not the device's.
  std::string access(const Accessor& by, const void* at, size_t bytes, bool write, bool atomic);

 private:
  static constexpr size_t kWord = 4;
  static constexpr size_t kGrain = 512;
  struct Access {
    uint64_t time = 0;
    uint32_t block = 0;
    uint16_t thread = 0;
    uint8_t mask = 0;  // bytes of the word
    bool atomic = false;
  };
  struct Cell {
    Access write;
    Access reads[2];
    uint64_t born = 0;  // time of the first write in this block
    uint8_t written = 0;
  };
  struct Shared {
    char* base = nullptr;
    size_t bytes = 0;     // that may be used
    size_t capacity = 0;  // of addresses
    std::vector<Cell> cells;
  };

  std::string check(const Accessor& by, Cell* cells, size_t offset, size_t bytes, bool write, bool atomic,
                    const char* kind);
  bool ordered(const Accessor& by, const Access& before) const;

  Arena arena_;
  Cell* arenaCells_ = nullptr;
  std::vector<uint16_t> usable_;  // bytes at the start of each grain of the arena
  Shared static_, dynamic_;
  std::vector<uint64_t> fences_;  // by block
  uint64_t time_ = 0;
  uint64_t launchBegan_ = 0;
};

}  // namespace viaduct::emulation
