// Slot table and storage; see slots.h.
#include "slots.h"

#include <algorithm>
#include <utility>

namespace viaduct {

void LateFrees::add(void* data, Backend& backend, std::shared_ptr<Stream> owner,
                    std::vector<std::shared_ptr<Event>> after) {
  std::lock_guard<std::mutex> lock(mutex_);
  entries_.push_back({data, &backend, std::move(owner), std::move(after)});
}

void LateFrees::settle(bool wait) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto due = [wait](Entry& entry) {
    for (const auto& event : entry.after) {
      if (wait) event->wait();
      if (!event->done()) return false;
    }
    entry.backend->release(entry.data, *entry.owner);
    return true;
  };
  entries_.erase(std::remove_if(entries_.begin(), entries_.end(), due), entries_.end());
}

Storage::Storage(Backend& backend, std::shared_ptr<Stream> owner, size_t bytes, std::shared_ptr<LateFrees> late)
    : backend_(backend), owner_(std::move(owner)), late_(std::move(late)), bytes_(bytes) {
  late_->settle(false);
  if (bytes == 0) return;
  try {
    data_ = backend_.allocate(bytes, *owner_);
  } catch (const Error& e) {
    if (e.code != "ERR_OUT_OF_MEMORY") throw;
    late_->settle(true);
    data_ = backend_.allocate(bytes, *owner_);
  }
}

Storage::~Storage() {
  if (data_ == nullptr) return;
  std::vector<std::shared_ptr<Event>> after;
  for (const Use& use : others_) {
    if (!owner_->isBehind(*use.stream, use.position)) after.push_back(use.stream->record());
  }
  if (after.empty()) {
    backend_.release(data_, *owner_);
    return;
  }
  late_->add(data_, backend_, owner_, std::move(after));
  late_->settle(false);
}

void Storage::noteOther(const std::shared_ptr<Stream>& stream) {
  const auto found = std::find_if(others_.begin(), others_.end(), [&](const Use& use) { return use.stream == stream; });
  if (found != others_.end()) {
    found->position = stream->position();
  } else {
    others_.push_back({stream, stream->position()});
  }
}

SlotTable::SlotTable() : late_(std::make_shared<LateFrees>()) {
  slots_.reserve(4096);
  slots_.emplace_back();  // slot 0 is never used: handle 0 means "absent"
}

int64_t SlotTable::empty(Backend& backend, const std::shared_ptr<Stream>& stream, const Dims& shape, DType dtype) {
  TensorRef tensor;
  tensor.dtype = dtype;
  tensor.ndim = shape.n;
  int64_t elements = 1;
  for (int i = shape.n - 1; i >= 0; --i) {
    const int64_t n = shape.v[i];
    VIADUCT_CHECK(n >= 0, "ERR_SHAPE", "empty", "expected dimensions of 0 or more, got " + std::to_string(n));
    tensor.shape[i] = n;
    tensor.stride[i] = elements;
    VIADUCT_CHECK(n == 0 || elements <= (int64_t{1} << 56) / n, "ERR_SHAPE", "empty", "too many elements");
    elements *= std::max<int64_t>(n, 1);
  }
  const size_t bytes = static_cast<size_t>(tensor.numel()) * dtypeBytes(dtype);
  auto storage = std::make_shared<Storage>(backend, stream, bytes, late_);
  tensor.data = storage->data();
  return take(tensor, std::move(storage));
}

int64_t SlotTable::view(int64_t handle, const Dims& shape, const Dims& strides, int64_t offset) {
  const Slot& base = at(handle, "view");
  VIADUCT_CHECK(shape.n == strides.n, "ERR_SHAPE", "view", "expected as many strides as dimensions");
  TensorRef tensor;
  tensor.dtype = base.tensor.dtype;
  tensor.ndim = shape.n;
  const auto width = static_cast<int64_t>(dtypeBytes(tensor.dtype));
  const auto* begin = static_cast<const char*>(base.storage->data());
  int64_t low = offset;
  if (begin != nullptr) low += (static_cast<const char*>(base.tensor.data) - begin) / width;
  int64_t high = low;
  bool empty = false;
  for (int i = 0; i < shape.n; ++i) {
    tensor.shape[i] = shape.v[i];
    tensor.stride[i] = strides.v[i];
    VIADUCT_CHECK(shape.v[i] >= 0, "ERR_SHAPE", "view", "expected dimensions of 0 or more");
    if (shape.v[i] == 0) {
      empty = true;
      continue;
    }
    const int64_t span = (shape.v[i] - 1) * strides.v[i];
    (span < 0 ? low : high) += span;
  }
  const int64_t elements = static_cast<int64_t>(base.storage->bytes()) / width;
  VIADUCT_CHECK(empty || (low >= 0 && high < elements), "ERR_SHAPE", "view",
                "expected elements inside of the storage's " + std::to_string(elements) + ", got " +
                    std::to_string(low) + " to " + std::to_string(high));
  if (begin != nullptr) tensor.data = static_cast<char*>(base.tensor.data) + offset * width;
  if (empty) tensor.data = base.storage->data();
  return take(tensor, base.storage);
}

void SlotTable::free(int64_t handle) {
  Slot& slot = at(handle, "free");
  slot.storage.reset();
  const auto index = static_cast<uint32_t>(handle & (kMaxSlots - 1));
  slot.generation += 1;
  live_ -= 1;
  if (slot.generation == 0) return;  // used up: this slot rests
  slot.nextFree = firstFree_;
  firstFree_ = index;
}

int64_t SlotTable::take(const TensorRef& tensor, std::shared_ptr<Storage> storage) {
  uint32_t index = firstFree_;
  if (index != 0) {
    firstFree_ = slots_[index].nextFree;
  } else {
    VIADUCT_CHECK(static_cast<int64_t>(slots_.size()) < kMaxSlots, "ERR_OUT_OF_MEMORY", "slots",
                  "expected at most " + std::to_string(kMaxSlots - 1) + " live tensors: dispose what is not used");
    index = static_cast<uint32_t>(slots_.size());
    slots_.emplace_back();
  }
  Slot& slot = slots_[index];
  slot.tensor = tensor;
  slot.storage = std::move(storage);
  live_ += 1;
  return static_cast<int64_t>(slot.generation) << kSlotBits | index;
}

void SlotTable::stale(int64_t handle, const char* where) const {
  const auto index = static_cast<uint64_t>(handle) & (kMaxSlots - 1);
  const bool known = handle > 0 && index > 0 && index < slots_.size();
  throw Error("ERR_HANDLE", where,
              "expected a live tensor, got handle " + std::to_string(handle) +
                  (known ? ", which was freed: set VIADUCT_DEBUG_HANDLES=1 to see where"
                         : ", which this thread's addon never gave out"));
}

}  // namespace viaduct
