// A stable sort by whole numbers on the device, of our own: items with equal keys stay in their order, so that what is summed
// item by item comes out the same in every run.
#pragma once

#include "launch.cuh"

namespace viaduct::cuda {

struct alignas(8) Keyed {
  uint32_t key;
  uint32_t value;
};

/// Bytes of working memory for a sort of n items.
size_t sortBytes(int64_t n);

/// Starts a sort of items[0..n) by key, n < 2^31; no key is above `largest`. Returns where the items will lie, sorted: in
/// `items` or in `work`, which holds sortBytes(n).
Keyed* stableSort(const Launch& on, Keyed* items, int64_t n, uint32_t largest, void* work);

}  // namespace viaduct::cuda
