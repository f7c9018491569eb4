// Best fit over per-stream free lists, with splitting and merging. See allocator.h for the rules.
#include "allocator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <string>

namespace viaduct::cpu {

namespace {

constexpr size_t kGrain = 512;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kArena = size_t{64} << 20;

size_t roundUp(size_t n, size_t step) { return (n + step - 1) / step * step; }

}  // namespace

CachingAllocator::~CachingAllocator() {
  if (base_ != nullptr) munmap(base_, reservation_);
}

void* CachingAllocator::allocate(size_t bytes, int64_t stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (bytes > (size_t{1} << 60)) outOfMemory(bytes, "that is more than any machine has");
  const size_t size = roundUp(std::max<size_t>(bytes, 1), kGrain);
  if (stats_.limitBytes > 0 && stats_.liveBytes + static_cast<int64_t>(size) > stats_.limitBytes) {
    outOfMemory(bytes, "the limit is reached");
  }
  Block* block = find(size, stream);
  if (block == nullptr) block = grow(size, stream);
  remove(block);
  if (block->bytes > size) {
    auto* rest = make({block->data + size, block->bytes - size, true, block->stream, block, block->after});
    if (rest->after != nullptr) rest->after->before = rest;
    if (last_ == block) last_ = rest;
    block->after = rest;
    block->bytes = size;
    insert(rest);
  }
  block->free = false;
  live_.emplace(block->data, block);
  stats_.liveBytes += static_cast<int64_t>(size);
  stats_.liveBlocks += 1;
  stats_.peakBytes = std::max(stats_.peakBytes, stats_.liveBytes);
  return block->data;
}

void CachingAllocator::release(void* memory, int64_t stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = live_.find(memory);
  VIADUCT_CHECK(found != live_.end(), "ERR_HANDLE", "allocator", "this memory is not handed out");
  Block* block = found->second;
  live_.erase(found);
  stats_.liveBytes -= static_cast<int64_t>(block->bytes);
  stats_.liveBlocks -= 1;
  block->free = true;
  block->stream = stream;
  insert(merged(block));
}

void CachingAllocator::settle(int64_t stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (Block* block = last_; block != nullptr; block = block->before) {
    if (!block->free || block->stream == 0 || (stream != 0 && block->stream != stream)) continue;
    remove(block);
    block->stream = 0;
    block = merged(block);
    insert(block);
  }
}

int64_t CachingAllocator::trim() {
  std::lock_guard<std::mutex> lock(mutex_);
  int64_t given = 0;
  for (Block* block = last_; block != nullptr; block = block->before) {
    if (!block->free || block->stream != 0) continue;
    const size_t begin = roundUp(static_cast<size_t>(block->data - base_), kHugePage);
    const size_t end = static_cast<size_t>(block->data - base_) + block->bytes;
    if (end <= begin + kHugePage) continue;
    const size_t bytes = (end - begin) / kHugePage * kHugePage;
    if (madvise(base_ + begin, bytes, MADV_DONTNEED) == 0) given += static_cast<int64_t>(bytes);
  }
  return given;
}

MemoryStats CachingAllocator::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

void CachingAllocator::resetPeak() {
  std::lock_guard<std::mutex> lock(mutex_);
  stats_.peakBytes = stats_.liveBytes;
}

void CachingAllocator::setLimit(int64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  stats_.limitBytes = std::max<int64_t>(bytes, 0);
}

CachingAllocator::Block* CachingAllocator::find(size_t bytes, int64_t stream) {
  Block key;
  key.bytes = bytes;
  Block* best = nullptr;
  for (const int64_t owner : {stream, int64_t{0}}) {
    auto list = free_.find(owner);
    if (list == free_.end()) continue;
    auto found = list->second.lower_bound(&key);
    if (found == list->second.end()) continue;
    if (best == nullptr || (*found)->bytes < best->bytes) best = *found;
    if (stream == 0) break;
  }
  return best;
}

CachingAllocator::Block* CachingAllocator::grow(size_t bytes, int64_t stream) {
  if (base_ == nullptr && !reserve()) outOfMemory(bytes, "the system gives no address space");
  const bool tailServes = last_ != nullptr && last_->free && (last_->stream == 0 || last_->stream == stream);
  const size_t missing = bytes - (tailServes ? last_->bytes : 0);
  size_t step = std::max(roundUp(missing, kHugePage), kArena);
  if (committed_ + step > reservation_) step = roundUp(missing, kHugePage);
  if (committed_ + step > reservation_) outOfMemory(bytes, "the reserved address space is used up");
  char* data = base_ + committed_;
  if (mprotect(data, step, PROT_READ | PROT_WRITE) != 0) outOfMemory(bytes, "the system gives no more memory");
  madvise(data, step, MADV_HUGEPAGE);
  committed_ += step;
  stats_.reservedBytes = static_cast<int64_t>(committed_);
  auto* block = make({data, step, true, tailServes ? last_->stream : 0, last_, nullptr});
  if (last_ != nullptr) last_->after = block;
  last_ = block;
  block = merged(block);
  insert(block);
  return block;
}

/// Address space costs nothing until it is committed; four times the machine's memory leaves room for fragmentation.
bool CachingAllocator::reserve() {
  const size_t physical = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
  for (size_t bytes = roundUp(physical * 4, kArena); bytes >= 2 * kArena; bytes = roundUp(bytes / 2, kArena)) {
    void* memory = mmap(nullptr, bytes + kHugePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) continue;
    auto address = reinterpret_cast<size_t>(memory);
    const size_t aligned = roundUp(address, kHugePage);
    if (aligned > address) munmap(memory, aligned - address);
    const size_t tail = kHugePage - (aligned - address);
    if (tail > 0) munmap(reinterpret_cast<char*>(aligned) + bytes, tail);
    base_ = reinterpret_cast<char*>(aligned);
    reservation_ = bytes;
    return true;
  }
  return false;
}

void CachingAllocator::insert(Block* block) { free_[block->stream].insert(block); }

void CachingAllocator::remove(Block* block) { free_[block->stream].erase(block); }

/// Joins a free block that is in no list with free neighbours of the same stream.
CachingAllocator::Block* CachingAllocator::merged(Block* block) {
  Block* after = block->after;
  if (after != nullptr && after->free && after->stream == block->stream) {
    remove(after);
    block->bytes += after->bytes;
    block->after = after->after;
    if (block->after != nullptr) block->after->before = block;
    if (last_ == after) last_ = block;
    drop(after);
  }
  Block* before = block->before;
  if (before != nullptr && before->free && before->stream == block->stream) {
    remove(before);
    before->bytes += block->bytes;
    before->after = block->after;
    if (before->after != nullptr) before->after->before = before;
    if (last_ == block) last_ = before;
    drop(block);
    block = before;
  }
  return block;
}

void CachingAllocator::outOfMemory(size_t bytes, const std::string& why) const {
  throw Error("ERR_OUT_OF_MEMORY", "allocator",
              "expected room for " + std::to_string(bytes) + " bytes, got none: " + why + " (live " +
                  std::to_string(stats_.liveBytes) + ", reserved " + std::to_string(stats_.reservedBytes) + ", limit " +
                  (stats_.limitBytes > 0 ? std::to_string(stats_.limitBytes) : "none") +
                  "): free tensors, or take a smaller batch or model");
}

}  // namespace viaduct::cpu
