// Memory of a GPU's allocator: one reservation of addresses, filled from the front with pieces of device memory (CUDA's
// virtual memory management), so that blocks of neighbouring pieces merge. The driver's functions are found at run time.
#pragma once

#include <cstddef>
#include <vector>

#include "../caching_allocator.h"
#include "device.h"

namespace viaduct::cuda {

class DeviceMemory final : public MemorySource {
 public:
  explicit DeviceMemory(const Device& device) : device_(device) {}
  ~DeviceMemory() override;
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  char* reserve(size_t* bytes) override;
  bool commit(char* at, size_t bytes) override;
  size_t giveBack(char* at, size_t bytes, bool last, size_t* uncommitted) override;

 private:
  struct Piece {
    char* at;
    size_t bytes;
    unsigned long long handle;
  };
  void unmap(const Piece& piece);

  const Device& device_;
  char* base_ = nullptr;
  size_t reservation_ = 0;
  std::vector<Piece> pieces_;  // by address
};

}  // namespace viaduct::cuda
