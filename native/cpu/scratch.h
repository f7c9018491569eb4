// Working memory of one command, reused from command to command. Only the stream's thread may ask for it, outside of
// parallel regions, and each ask takes the memory from the one before it.
#pragma once

#include <cstddef>
#include <vector>

namespace viaduct::cpu {

template <typename T>
T* scratch(size_t n) {
  thread_local std::vector<T> memory;
  if (memory.size() < n) memory.resize(n);
  return memory.data();
}

}  // namespace viaduct::cpu
