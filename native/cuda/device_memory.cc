// Reserving, mapping and unmapping device memory; see device_memory.h.
#include "device_memory.h"

#include <cuda.h>

#include <type_traits>

namespace viaduct::cuda {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;  // CUDA's granularity of such memory

/// The driver's functions; the library that the driver brings is not there where this is linked.
struct Driver {
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) unreserve = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) setAccess = nullptr;

  template <typename F>
  static void find(const char* name, F* function) {
    cudaDriverEntryPointQueryResult result{};
    void* address = nullptr;
    check(cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, &result), name);
    VIADUCT_CHECK(address != nullptr, "ERR_UNSUPPORTED", "cuda",
                  std::string("expected a driver with ") + name + ", got an older one: update the NVIDIA driver");
    *function = reinterpret_cast<F>(address);
  }

  static const Driver& get() {
    static const Driver driver = [] {
      Driver d;
      find("cuMemAddressReserve", &d.reserve);
      find("cuMemAddressFree", &d.unreserve);
      find("cuMemCreate", &d.create);
      find("cuMemRelease", &d.release);
      find("cuMemMap", &d.map);
      find("cuMemUnmap", &d.unmap);
      find("cuMemSetAccess", &d.setAccess);
      return d;
    }();
    return driver;
  }
};

CUmemLocation locationOf(const Device& device) {
  CUmemLocation location{};
  location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  location.id = device.ordinal();
  return location;
}

CUdeviceptr address(char* at) { return reinterpret_cast<CUdeviceptr>(at); }

}  // namespace

DeviceMemory::~DeviceMemory() {
  for (const Piece& piece : pieces_) unmap(piece);
  if (base_ != nullptr) Driver::get().unreserve(address(base_), reservation_);
}

/// Addresses cost nothing until memory is mapped; four times the GPU's memory leaves room for fragmentation.
char* DeviceMemory::reserve(size_t* bytes) {
  device_.makeCurrent();
  const size_t wanted = (device_.properties().totalGlobalMem * 4 + kHugePage - 1) / kHugePage * kHugePage;
  CUdeviceptr base = 0;
  if (Driver::get().reserve(&base, wanted, 0, 0, 0) != CUDA_SUCCESS) return nullptr;
  base_ = reinterpret_cast<char*>(base);
  *bytes = reservation_ = wanted;
  return base_;
}

bool DeviceMemory::commit(char* at, size_t bytes) {
  device_.makeCurrent();
  const Driver& driver = Driver::get();
  CUmemAllocationProp kind{};
  kind.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  kind.location = locationOf(device_);
  CUmemGenericAllocationHandle handle = 0;
  if (driver.create(&handle, bytes, &kind, 0) != CUDA_SUCCESS) return false;
  const Piece piece{at, bytes, handle};
  if (driver.map(address(at), bytes, 0, handle, 0) != CUDA_SUCCESS) {
    driver.release(handle);
    return false;
  }
  CUmemAccessDesc access{};
  access.location = locationOf(device_);
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  if (driver.setAccess(address(at), bytes, &access, 1) != CUDA_SUCCESS) {
    unmap(piece);
    return false;
  }
  pieces_.push_back(piece);
  return true;
}

/// Whole pieces at the end.
size_t DeviceMemory::giveBack(char* at, size_t, bool last, size_t* uncommitted) {
  size_t given = 0;
  while (last && !pieces_.empty() && pieces_.back().at >= at) {
    given += pieces_.back().bytes;
    unmap(pieces_.back());
    pieces_.pop_back();
  }
  *uncommitted = given;
  return given;
}

void DeviceMemory::unmap(const Piece& piece) {
  Driver::get().unmap(address(piece.at), piece.bytes);
  Driver::get().release(piece.handle);
}

}  // namespace viaduct::cuda
