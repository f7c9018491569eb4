// The slot table: who owns device memory. A handle (generation * 2^20 + slot) names a slot; a slot is a view (dtype, shape,
// strides) of a storage; a storage goes back to its stream's pool when its last slot and its last pin are gone. One table
// for each JavaScript environment, used on its thread only; pins may be dropped on any thread. See docs/runtime.md, 1.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend.h"

namespace viaduct {

constexpr int64_t kSlotBits = 20;
constexpr int64_t kMaxSlots = int64_t{1} << kSlotBits;

/// Memory whose last use was on another stream than the one that owns it; it goes home when that stream has passed.
/// Shared by the storages of a table; thread-safe.
class LateFrees {
 public:
  ~LateFrees() { settle(true); }
  void add(void* data, Backend& backend, std::shared_ptr<Stream> owner, std::vector<std::shared_ptr<Event>> after);
  /// Returns what is due; with `wait`, waits for all.
  void settle(bool wait);

 private:
  struct Entry {
    void* data;
    Backend* backend;
    std::shared_ptr<Stream> owner;
    std::vector<std::shared_ptr<Event>> after;
  };
  std::mutex mutex_;
  std::vector<Entry> entries_;
};

/// One block of device memory. Holding a shared_ptr to it (a pin) keeps the memory alive.
class Storage {
 public:
  Storage(Backend& backend, std::shared_ptr<Stream> owner, size_t bytes, std::shared_ptr<LateFrees> late);
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  /// Notes a use on `stream`. The owner's own uses need no note: it runs in order.
  void noteUse(const std::shared_ptr<Stream>& stream) {
    if (stream == owner_) return;
    noteOther(stream);
  }
  Backend& backend() const { return backend_; }
  const std::shared_ptr<Stream>& owner() const { return owner_; }
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

  int64_t version = 0;

 private:
  /// The last use on another stream than the owner: the commands that it had by then.
  struct Use {
    std::shared_ptr<Stream> stream;
    uint64_t position;
  };
  void noteOther(const std::shared_ptr<Stream>& stream);

  Backend& backend_;
  std::shared_ptr<Stream> owner_;
  std::shared_ptr<LateFrees> late_;
  void* data_ = nullptr;
  size_t bytes_;
  std::vector<Use> others_;
};

struct Slot {
  TensorRef tensor;
  std::shared_ptr<Storage> storage;  // null when the slot is free
  uint32_t generation = 1;
  uint32_t nextFree = 0;
};

class SlotTable {
 public:
  SlotTable();

  /// New memory, contiguous. Throws ERR_OUT_OF_MEMORY.
  int64_t empty(Backend& backend, const std::shared_ptr<Stream>& stream, const Dims& shape, DType dtype);
  /// A slot on the storage of `handle`; `offset` counts elements from the first element of `handle`. Throws ERR_SHAPE when
  /// an element would lie outside of the storage.
  int64_t view(int64_t handle, const Dims& shape, const Dims& strides, int64_t offset);
  void free(int64_t handle);

  /// The slot of a live handle, else throws ERR_HANDLE naming `where`. The reference is good until the table changes.
  Slot& at(int64_t handle, const char* where) {
    const auto index = static_cast<uint64_t>(handle) & (kMaxSlots - 1);
    if (handle > 0 && index < slots_.size()) {
      Slot& slot = slots_[index];
      if (slot.storage != nullptr && slot.generation == handle >> kSlotBits) return slot;
    }
    stale(handle, where);
  }
  int64_t live() const { return live_; }

 private:
  [[noreturn]] void stale(int64_t handle, const char* where) const;
  int64_t take(const TensorRef& tensor, std::shared_ptr<Storage> storage);

  std::vector<Slot> slots_;
  std::shared_ptr<LateFrees> late_;
  uint32_t firstFree_ = 0;
  int64_t live_ = 0;
};

}  // namespace viaduct
