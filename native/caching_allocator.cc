// Best fit over per-stream free lists, with splitting and merging. See caching_allocator.h for the rules.
#include "caching_allocator.h"

#include <algorithm>
#include <string>

namespace viaduct {

namespace {

constexpr size_t kGrain = 512;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kArena = size_t{64} << 20;

size_t roundUp(size_t n, size_t step) { return (n + step - 1) / step * step; }

}  // namespace

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
  for (Block *block = last_, *before = nullptr; block != nullptr; block = before) {
    before = block->before;
    if (!block->free || block->stream != 0) continue;
    size_t uncommitted = 0;
    given += static_cast<int64_t>(source_.giveBack(block->data, block->bytes, block == last_, &uncommitted));
    if (uncommitted > 0) shrinkLast(uncommitted);
  }
  return given;
}

void CachingAllocator::shrinkLast(size_t bytes) {
  committed_ -= bytes;
  stats_.reservedBytes = static_cast<int64_t>(committed_);
  Block* block = last_;
  remove(block);
  block->bytes -= bytes;
  if (block->bytes > 0) {
    insert(block);
    return;
  }
  last_ = block->before;
  if (last_ != nullptr) last_->after = nullptr;
  drop(block);
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
  if (base_ == nullptr) base_ = source_.reserve(&reservation_);
  if (base_ == nullptr) outOfMemory(bytes, "the system gives no address space");
  const bool tailServes = last_ != nullptr && last_->free && (last_->stream == 0 || last_->stream == stream);
  const size_t missing = bytes - (tailServes ? last_->bytes : 0);
  size_t step = std::max(roundUp(missing, kHugePage), kArena);
  if (committed_ + step > reservation_) step = roundUp(missing, kHugePage);
  if (committed_ + step > reservation_) outOfMemory(bytes, "the reserved address space is used up");
  char* data = base_ + committed_;
  if (!source_.commit(data, step)) {
    step = roundUp(missing, kHugePage);
    if (!source_.commit(data, step)) outOfMemory(bytes, "the device gives no more memory");
  }
  committed_ += step;
  stats_.reservedBytes = static_cast<int64_t>(committed_);
  auto* block = make({data, step, true, tailServes ? last_->stream : 0, last_, nullptr});
  if (last_ != nullptr) last_->after = block;
  last_ = block;
  block = merged(block);
  insert(block);
  return block;
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

}  // namespace viaduct
