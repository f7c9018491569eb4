// The caching allocator of a device: one reservation of address space, committed from the front in steps of at least 64 MiB
// and kept, so that neighbours merge. Thread-safe. A free block remembers the stream that freed it and serves that stream at
// once, because a stream runs in order; stream 0 means that nothing in flight touches it. Nothing here waits for a stream,
// and nothing here touches the memory: a MemorySource says where it comes from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <memory_resource>
#include <mutex>
#include <set>
#include <unordered_map>

#include "backend.h"

namespace viaduct {

/// Where an allocator's memory comes from.
class MemorySource {
 public:
  virtual ~MemorySource() = default;
  /// The first byte of a reservation that costs nothing until it is committed, or null; `bytes` receives its size.
  virtual char* reserve(size_t* bytes) = 0;
  /// Makes [at, at + bytes) usable. False when the system has no more.
  virtual bool commit(char* at, size_t bytes) = 0;
  /// Gives back what can be had from the settled free range [at, at + bytes); returns the bytes. With `last` no committed
  /// byte follows the range, and *uncommitted may be set: what was given back from its end must be committed again.
  virtual size_t giveBack(char* at, size_t bytes, bool last, size_t* uncommitted) = 0;
};

class CachingAllocator {
 public:
  explicit CachingAllocator(MemorySource& source) : source_(source) {}
  CachingAllocator(const CachingAllocator&) = delete;
  CachingAllocator& operator=(const CachingAllocator&) = delete;

  /// At least `bytes`, on a boundary of 512 bytes. Throws ERR_OUT_OF_MEMORY.
  void* allocate(size_t bytes, int64_t stream);
  void release(void* memory, int64_t stream);
  /// Stream `stream` (or every stream, for 0) has passed all uses: its free blocks serve everyone and merge.
  void settle(int64_t stream);
  /// Gives the memory of settled free blocks back to the system; returns the bytes given back.
  int64_t trim();

  MemoryStats stats() const;
  void resetPeak();
  void setLimit(int64_t bytes);

 private:
  struct Block {
    char* data = nullptr;
    size_t bytes = 0;
    bool free = true;
    int64_t stream = 0;
    Block* before = nullptr;
    Block* after = nullptr;
  };
  struct BySize {
    bool operator()(const Block* a, const Block* b) const {
      return a->bytes != b->bytes ? a->bytes < b->bytes : a->data < b->data;
    }
  };
  using FreeList = std::pmr::set<Block*, BySize>;

  Block* make(const Block& block) { return new (nodes_.allocate(sizeof(Block))) Block(block); }
  void drop(Block* block) { nodes_.deallocate(block, sizeof(Block)); }
  Block* find(size_t bytes, int64_t stream);
  Block* grow(size_t bytes, int64_t stream);
  void shrinkLast(size_t bytes);
  void insert(Block* block);
  void remove(Block* block);
  Block* merged(Block* block);
  [[noreturn]] void outOfMemory(size_t bytes, const std::string& why) const;

  MemorySource& source_;
  mutable std::mutex mutex_;
  std::pmr::unsynchronized_pool_resource nodes_;  // of the containers below and the blocks, under the mutex
  char* base_ = nullptr;
  size_t reservation_ = 0;  // bytes of address space
  size_t committed_ = 0;    // bytes at the front that may be touched
  Block* last_ = nullptr;
  std::pmr::map<int64_t, FreeList> free_{&nodes_};
  std::pmr::unordered_map<void*, Block*> live_{&nodes_};
  MemoryStats stats_;
};

}  // namespace viaduct
