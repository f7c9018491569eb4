// Bounds, initialisation and races; see shadow.h.
#include "shadow.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

namespace viaduct::emulation {

namespace {

std::string byteCount(size_t bytes) { return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes"); }

std::string threadText(uint32_t block, uint16_t thread) {
  return "thread " + std::to_string(thread) + " of block " + std::to_string(block);
}

}  // namespace

void Shadow::setArena(Arena arena) {
  arena_ = arena;
  const size_t bytes = arena.bytes / kWord * sizeof(Cell);
  // Costs memory only where kernels touch the arena.
  void* cells = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  arenaCells_ = cells == MAP_FAILED ? nullptr : static_cast<Cell*>(cells);
  usable_.assign(arena.bytes / kGrain, 0);
}

void Shadow::allocated(char* data, size_t bytes) {
  size_t grain = static_cast<size_t>(data - arena_.base) / kGrain;
  for (size_t at = 0; at < bytes; at += kGrain) usable_[grain++] = static_cast<uint16_t>(std::min(kGrain, bytes - at));
  usable_[grain] = 0;
}

bool Shadow::usable(const void* data, size_t bytes) const {
  size_t offset = static_cast<size_t>(static_cast<const char*>(data) - arena_.base);
  while (bytes > 0) {
    if (offset >= arena_.bytes) return false;
    const size_t inside = offset % kGrain;
    const size_t size = std::min(bytes, kGrain - inside);
    if (usable_[offset / kGrain] < inside + size) return false;
    offset += size;
    bytes -= size;
  }
  return true;
}

void Shadow::beginLaunch(uint64_t blocks) {
  launchBegan_ = tick();
  fences_.assign(blocks, 0);
}

void Shadow::setStatic(char* base, size_t bytes) {
  static_.base = base;
  static_.bytes = static_.capacity = bytes;
  static_.cells.resize(bytes / kWord + 2);
}

void Shadow::setDynamic(char* base, size_t bytes, size_t capacity) {
  dynamic_.base = base;
  dynamic_.bytes = bytes;
  dynamic_.capacity = capacity;
  dynamic_.cells.resize(capacity / kWord + 2);
}

std::string Shadow::access(const Accessor& by, const void* at, size_t bytes, bool write, bool atomic) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  const size_t offset = address - reinterpret_cast<uintptr_t>(arena_.base);
  if (offset < arena_.bytes) {
    if (!usable(at, bytes)) {
      return std::string(write ? "writes " : "reads ") + byteCount(bytes) + " of device memory outside of any tensor";
    }
    return check(by, arenaCells_, offset, bytes, write, atomic, nullptr);
  }
  for (Shared* shared : {&static_, &dynamic_}) {
    const size_t inside = address - reinterpret_cast<uintptr_t>(shared->base);
    if (inside >= shared->capacity) continue;
    if (inside + bytes > shared->bytes) {
      return std::string(write ? "writes " : "reads ") + byteCount(bytes) + " at byte " + std::to_string(inside) +
             " of dynamic shared memory, of which there are " + byteCount(shared->bytes);
    }
    return check(by, shared->cells.data(), inside, bytes, write, atomic, "shared");
  }
  return {};
}

bool Shadow::ordered(const Accessor& by, const Access& before) const {
  if (before.time < launchBegan_) return true;
  if (before.block != by.block) return before.time < fences_[before.block];
  if (before.thread == by.thread || before.time < by.barrier) return true;
  return before.thread / 32 == by.thread / 32 && before.time < by.warpSync;
}

std::string Shadow::check(const Accessor& by, Cell* cells, size_t offset, size_t bytes, bool write, bool atomic,
                          const char* kind) {
  const uint64_t now = tick();
  const bool shared = kind != nullptr;
  const auto problem = [&](const char* what, const Access& other) {
    return std::string(write ? "writes " : "reads ") + byteCount(bytes) + " of " + (shared ? "shared" : "device") +
           " memory that " + threadText(other.block, other.thread) + " " + what + ", with no barrier between";
  };
  while (bytes > 0) {
    Cell& cell = cells[offset / kWord];
    const size_t inside = offset % kWord;
    const size_t size = std::min(bytes, kWord - inside);
    const auto mask = static_cast<uint8_t>(((1u << size) - 1) << inside);
    const auto races = [&](const Access& other) {
      if ((other.mask & mask) == 0 || (atomic && other.atomic)) return false;
      if (shared && other.time < by.blockBegan) return false;  // another block's memory lay here
      return !ordered(by, other);
    };
    if (shared && cell.born < by.blockBegan) {
      cell.born = now;
      cell.written = 0;
    }
    if (races(cell.write)) return problem("wrote", cell.write);
    if (!write && shared && (cell.written & mask) != mask) {
      return "reads " + byteCount(bytes) + " of shared memory that no thread of the block has written";
    }
    const Access access{now, by.block, by.thread, mask, atomic};
    if (write) {
      for (const Access& read : cell.reads) {
        if (races(read)) return problem("read", read);
      }
      cell.write = access;
      cell.written |= mask;
    } else {
      // Two readers of different warps are kept: a writer that is not ordered behind all readers is not behind both.
      Access* slot = &cell.reads[0];
      if (slot->time != 0 && !ordered(by, *slot) && slot->thread / 32 != by.thread / 32) slot = &cell.reads[1];
      *slot = access;
    }
    offset += size;
    bytes -= size;
  }
  return {};
}

}  // namespace viaduct::emulation
