// Reserves, commits and gives back pages; see host_pages.h.
#include "host_pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace viaduct::cpu {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kArena = size_t{64} << 20;

size_t roundUp(size_t n, size_t step) { return (n + step - 1) / step * step; }

}  // namespace

HostPages::~HostPages() {
  if (base_ != nullptr) munmap(base_, reservation_);
}

/// Address space costs nothing until it is committed; four times the machine's memory leaves room for fragmentation.
char* HostPages::reserve(size_t* reserved) {
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
    *reserved = reservation_ = bytes;
    return base_;
  }
  return nullptr;
}

bool HostPages::commit(char* at, size_t bytes) {
  if (mprotect(at, bytes, PROT_READ | PROT_WRITE) != 0) return false;
  madvise(at, bytes, MADV_HUGEPAGE);
  return true;
}

/// Whole huge pages inside of the range; they stay committed and come back when they are touched.
size_t HostPages::giveBack(char* at, size_t bytes, bool, size_t*) {
  const size_t offset = static_cast<size_t>(at - base_);
  const size_t begin = roundUp(offset, kHugePage);
  const size_t end = offset + bytes;
  if (end <= begin + kHugePage) return 0;
  const size_t given = (end - begin) / kHugePage * kHugePage;
  return madvise(base_ + begin, given, MADV_DONTNEED) == 0 ? given : 0;
}

}  // namespace viaduct::cpu
