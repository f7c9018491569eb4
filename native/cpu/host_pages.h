// Memory of the CPU's allocator: a reservation of address space, committed page by page, on huge pages.
#pragma once

#include <cstddef>

#include "../caching_allocator.h"

namespace viaduct::cpu {

class HostPages final : public MemorySource {
 public:
  HostPages() = default;
  ~HostPages() override;
  HostPages(const HostPages&) = delete;
  HostPages& operator=(const HostPages&) = delete;
  char* reserve(size_t* bytes) override;
  bool commit(char* at, size_t bytes) override;
  size_t giveBack(char* at, size_t bytes, bool last, size_t* uncommitted) override;

 private:
  char* base_ = nullptr;
  size_t reservation_ = 0;
};

}  // namespace viaduct::cpu
