// CUDA's built-in functions and vector types for the emulation; included by include/cuda_runtime.h. Functions that wait for
// other threads are macros, so that they know their line: threads that wait in different lines are an error.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

// ---- vector types
#define VIADUCT_VECTOR(name, T, bytes)                       \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(bytes) name##4 { T x, y, z, w; };           \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VIADUCT_VECTOR(float, float, 16)
VIADUCT_VECTOR(int, int, 16)
VIADUCT_VECTOR(uint, unsigned, 16)
VIADUCT_VECTOR(ushort, unsigned short, 8)
VIADUCT_VECTOR(uchar, unsigned char, 4)
#undef VIADUCT_VECTOR
struct alignas(16) double2 {
  double x, y;
};
inline double2 make_double2(double x, double y) { return {x, y}; }

namespace viaduct::emulation {

// ---- waiting for others (block.cc). `file` and `line` name the place.
int blockBarrier(const char* file, int line, int value, char kind);
/// Values of the lanes of `mask` that live, by lane, after all of them have come; `present` says which. Good until the lane's
/// next call. `ordersMemory`: what a lane wrote before is there for the others behind.
const uint64_t* gatherLanes(const char* file, int line, unsigned mask, uint64_t mine, unsigned* present,
                            bool ordersMemory);
unsigned laneIndex();
unsigned liveLanes();
/// Ends the kernel with an error.
[[noreturn]] void failThread(const char* message);
void fence();
/// Notes an atomic access: other atomic ones of the same bytes are no race with it.
void atomicAccess(void* at, size_t bytes);

template <typename T>
uint64_t toBits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <typename T>
T fromBits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// Which lane a shuffle reads, or the own one where CUDA says so.
inline int sourceLane(char kind, int lane, int amount, int width) {
  const int first = lane / width * width;
  if (kind == 'i') return first + (amount & (width - 1));
  if (kind == 'u') return lane - amount < first ? lane : lane - amount;
  if (kind == 'd') return lane + amount >= first + width ? lane : lane + amount;
  const int other = lane ^ amount;
  return other >= first + width ? lane : other;
}

template <typename T>
T shuffle(const char* file, int line, char kind, unsigned mask, T value, int amount, int width = 32) {
  unsigned present = 0;
  const uint64_t* values = gatherLanes(file, line, mask, toBits(value), &present, false);
  const int source = sourceLane(kind, static_cast<int>(laneIndex()), amount, width);
  if ((present >> source & 1) == 0) failThread("shuffles from a lane that does not take part");
  return fromBits<T>(values[source]);
}

inline unsigned ballot(const char* file, int line, unsigned mask, bool predicate) {
  unsigned present = 0, bits = 0;
  const uint64_t* values = gatherLanes(file, line, mask, predicate, &present, false);
  for (int i = 0; i < 32; ++i) bits |= (present >> i & 1) != 0 && values[i] != 0 ? 1u << i : 0u;
  return bits;
}
inline bool allLanes(const char* file, int line, unsigned mask, bool predicate) {
  return ballot(file, line, mask, !predicate) == 0;
}

template <typename T, typename F>
T reduceLanes(const char* file, int line, unsigned mask, T value, F join) {
  unsigned present = 0;
  const uint64_t* values = gatherLanes(file, line, mask, toBits(value), &present, false);
  T total = value;
  for (int i = 0; i < 32; ++i) {
    if ((present >> i & 1) != 0 && i != static_cast<int>(laneIndex())) total = join(total, fromBits<T>(values[i]));
  }
  return total;
}

/// Not checked as a plain access, which is why it must not be inlined.
template <typename T, typename F>
__attribute__((no_sanitize("thread"), noinline)) T atomicUpdate(T* at, F change) {
  atomicAccess(at, sizeof *at);
  T old;
  std::memcpy(&old, at, sizeof old);
  const T next = change(old);
  std::memcpy(at, &next, sizeof next);
  return old;
}

}  // namespace viaduct::emulation

// ---- barriers
#define __syncthreads() ((void)viaduct::emulation::blockBarrier(__FILE__, __LINE__, 0, 's'))
#define __syncthreads_count(p) viaduct::emulation::blockBarrier(__FILE__, __LINE__, (p) != 0, '+')
#define __syncthreads_or(p) (viaduct::emulation::blockBarrier(__FILE__, __LINE__, (p) != 0, '+') != 0)
#define __syncthreads_and(p) (viaduct::emulation::blockBarrier(__FILE__, __LINE__, (p) == 0, '+') == 0)
inline void viaductSyncWarp(const char* file, int line, unsigned mask = 0xffffffffu) {
  unsigned present = 0;
  viaduct::emulation::gatherLanes(file, line, mask, 0, &present, true);
}
#define VIADUCT_HERE __FILE__, __LINE__
#define __syncwarp(...) viaductSyncWarp(__FILE__, __LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define __threadfence() viaduct::emulation::fence()
#define __threadfence_block() ((void)0)

// ---- within a warp
#define __shfl_sync(mask, ...) viaduct::emulation::shuffle(VIADUCT_HERE, 'i', mask, __VA_ARGS__)
#define __shfl_up_sync(mask, ...) viaduct::emulation::shuffle(VIADUCT_HERE, 'u', mask, __VA_ARGS__)
#define __shfl_down_sync(mask, ...) viaduct::emulation::shuffle(VIADUCT_HERE, 'd', mask, __VA_ARGS__)
#define __shfl_xor_sync(mask, ...) viaduct::emulation::shuffle(VIADUCT_HERE, 'x', mask, __VA_ARGS__)
#define __ballot_sync(mask, p) viaduct::emulation::ballot(VIADUCT_HERE, mask, (p) != 0)
#define __any_sync(mask, p) (viaduct::emulation::ballot(VIADUCT_HERE, mask, (p) != 0) != 0)
#define __all_sync(mask, p) viaduct::emulation::allLanes(VIADUCT_HERE, mask, (p) != 0)
#define __reduce_add_sync(mask, v) \
  viaduct::emulation::reduceLanes(VIADUCT_HERE, mask, v, [](auto a, auto b) { return a + b; })
#define __reduce_max_sync(mask, v) \
  viaduct::emulation::reduceLanes(VIADUCT_HERE, mask, v, [](auto a, auto b) { return a > b ? a : b; })
#define __reduce_min_sync(mask, v) \
  viaduct::emulation::reduceLanes(VIADUCT_HERE, mask, v, [](auto a, auto b) { return a < b ? a : b; })
#define __activemask() viaduct::emulation::liveLanes()

// ---- atomics: one thread runs at a time, so they are plain; what is checked is that others are atomic too
template <typename T>
T atomicAdd(T* at, std::common_type_t<T> v) {
  return viaduct::emulation::atomicUpdate(at, [v](T old) { return static_cast<T>(old + v); });
}
template <typename T>
T atomicSub(T* at, std::common_type_t<T> v) {
  return viaduct::emulation::atomicUpdate(at, [v](T old) { return static_cast<T>(old - v); });
}
template <typename T>
T atomicMax(T* at, std::common_type_t<T> v) {
  return viaduct::emulation::atomicUpdate(at, [v](T old) { return old > v ? old : v; });
}
template <typename T>
T atomicMin(T* at, std::common_type_t<T> v) {
  return viaduct::emulation::atomicUpdate(at, [v](T old) { return old < v ? old : v; });
}
template <typename T>
T atomicExch(T* at, std::common_type_t<T> v) {
  return viaduct::emulation::atomicUpdate(at, [v](T) { return v; });
}
template <typename T>
T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> v) {
  return viaduct::emulation::atomicUpdate(at, [=](T old) { return old == expected ? v : old; });
}
template <typename T>
T atomicOr(T* at, std::common_type_t<T> v) {
  return viaduct::emulation::atomicUpdate(at, [v](T old) { return static_cast<T>(old | v); });
}
template <typename T>
T atomicAnd(T* at, std::common_type_t<T> v) {
  return viaduct::emulation::atomicUpdate(at, [v](T old) { return static_cast<T>(old & v); });
}
inline unsigned atomicInc(unsigned* at, unsigned most) {
  return viaduct::emulation::atomicUpdate(at, [most](unsigned old) { return old >= most ? 0u : old + 1; });
}

// ---- loads and stores with a hint
template <typename T>
T __ldg(const T* at) {
  return *at;
}
template <typename T>
T __ldcs(const T* at) {
  return *at;
}
template <typename T>
T __ldcg(const T* at) {
  return *at;
}
template <typename T>
void __stcs(T* at, T value) {
  *at = value;
}
template <typename T>
void __stcg(T* at, T value) {
  *at = value;
}

// ---- numbers
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline unsigned __float_as_uint(float x) {
  return viaduct::emulation::fromBits<unsigned>(viaduct::emulation::toBits(x));
}
inline int __float_as_int(float x) { return viaduct::emulation::fromBits<int>(viaduct::emulation::toBits(x)); }
inline float __uint_as_float(unsigned x) { return viaduct::emulation::fromBits<float>(x); }
inline float __int_as_float(int x) { return viaduct::emulation::fromBits<float>(viaduct::emulation::toBits(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
