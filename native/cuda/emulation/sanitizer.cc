// Where the compiler's checks end: kernels are compiled with -fsanitize=thread and -fsanitize=alignment, which call a function
// for every access to memory. These are the functions; the sanitizers' own libraries are not linked. Not instrumented itself.
#include <cstdint>
#include <string>

#include "block.h"

using viaduct::emulation::noteAccess;

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define VIADUCT_ACCESS(bytes)                                                                                \
  void __tsan_read##bytes(void* at) { noteAccess(at, bytes, false, __builtin_return_address(0)); }           \
  void __tsan_write##bytes(void* at) { noteAccess(at, bytes, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##bytes(void* at) { noteAccess(at, bytes, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* at) { noteAccess(at, bytes, true, __builtin_return_address(0)); } \
  void __tsan_volatile_read##bytes(void* at) { noteAccess(at, bytes, false, __builtin_return_address(0)); }  \
  void __tsan_volatile_write##bytes(void* at) { noteAccess(at, bytes, true, __builtin_return_address(0)); }
VIADUCT_ACCESS(1)
VIADUCT_ACCESS(2)
VIADUCT_ACCESS(4)
VIADUCT_ACCESS(8)
VIADUCT_ACCESS(16)
#undef VIADUCT_ACCESS

void __tsan_read_range(void* at, size_t bytes) { noteAccess(at, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* at, size_t bytes) { noteAccess(at, bytes, true, __builtin_return_address(0)); }

// The host's own atomics in the files of kernels (counts of references): done, not checked.
#define VIADUCT_ATOMIC(bits, T)                                                                                       \
  T __tsan_atomic##bits##_load(const volatile T* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }           \
  void __tsan_atomic##bits##_store(volatile T* at, T v, int) { __atomic_store_n(at, v, __ATOMIC_SEQ_CST); }           \
  T __tsan_atomic##bits##_exchange(volatile T* at, T v, int) { return __atomic_exchange_n(at, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_add(volatile T* at, T v, int) { return __atomic_fetch_add(at, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_sub(volatile T* at, T v, int) { return __atomic_fetch_sub(at, v, __ATOMIC_SEQ_CST); } \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* at, T* old, T v, int, int) {                          \
    return __atomic_compare_exchange_n(at, old, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                        \
  }
VIADUCT_ATOMIC(8, uint8_t)
VIADUCT_ATOMIC(32, uint32_t)
VIADUCT_ATOMIC(64, uint64_t)
#undef VIADUCT_ATOMIC
void __tsan_atomic_thread_fence(int) {}

struct SourceLocation {
  const char* file;
  uint32_t line;
  uint32_t column;
};
/// The compiler's record of the place; the first member is all that is read.
void __ubsan_handle_type_mismatch_v1(const SourceLocation* at, uintptr_t address) {
  viaduct::emulation::failAt("uses address " + std::to_string(address % 16) +
                             " modulo 16 for a type that wants more, at " + at->file + ":" + std::to_string(at->line));
}

}  // extern "C"
