// The scheduler of a block's threads, barriers and exchanges within warps; see block.h.
#include "block.h"

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <vector>

#include "../../errors.h"
#include "fibre.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace viaduct::emulation {

namespace {

constexpr size_t kDynamicShared = size_t{256} << 10;
constexpr int kMaxThreads = 1024;

struct Place {
  const char* file = nullptr;
  int line = 0;
  bool operator==(const Place& other) const { return line == other.line && std::string(file) == other.file; }
};

enum class State { Ready, AtBarrier, InWarp, Ended };

struct Thread {
  Fibre fibre;
  State state = State::Ended;
  uint3 index{};
  Place place;
  int barrierValue = 0;
  unsigned laneMask = 0;
  bool ordersMemory = false;
  uint64_t mine = 0;
  uint64_t lanes[32];
  unsigned present = 0;
};

/// All of a launch. One at a time in the process.
struct Launch {
  const std::function<void()>* kernel = nullptr;
  Thread threads[kMaxThreads];
  int count = 0;
  int running = -1;
  int barrierTotal = 0;
  uint32_t block = 0;
  uint64_t blockBegan = 0, barrier = 0;
  uint64_t warpSync[kMaxThreads / 32];
  std::vector<int> ready;
  Fibre scheduler;
  std::string error;
};

std::mutex& mutex() {
  static auto* m = new std::mutex();
  return *m;
}
// Of the thread that runs a kernel, while it does: other threads run code of the host beside it.
thread_local Launch* launched = nullptr;
uint64_t random = 1;
alignas(16) char dynamic[kDynamicShared];
char* stacks = nullptr;

uint64_t draw(uint64_t below) {
  random ^= random << 13;
  random ^= random >> 7;
  random ^= random << 17;
  return (random >> 11) % below;
}

std::string indexText(const uint3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string placeText(const Place& place) {
  const std::string file = place.file == nullptr ? "?" : place.file;
  const size_t slash = file.rfind('/');
  return (slash == std::string::npos ? file : file.substr(slash + 1)) + ":" + std::to_string(place.line);
}

/// File and line of code, as the debugger's table has it; binutils come with the compiler.
std::string lineOf(void* code) {
  Dl_info info;
  if (code == nullptr || dladdr(code, &info) == 0) return "";
  char command[4096];
  const auto offset = reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1;
  std::snprintf(command, sizeof command, "addr2line -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return "";
  char line[1024] = "";
  if (std::fgets(line, sizeof line, pipe) == nullptr) line[0] = 0;
  pclose(pipe);
  std::string text = line;
  text.erase(std::min(text.find(" ("), text.size()));
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.pop_back();
  if (text.empty() || text[0] == '?') return "";
  return ", at " + text.substr(text.rfind('/') + 1);
}

[[noreturn]] void leave(Launch& launch) {
  launch.scheduler.enter(launch.threads[launch.running].fibre);
  std::abort();  // a thread that has ended is never entered again
}

void threadMain() {
  Launch& launch = *launched;
  (*launch.kernel)();
  launch.threads[launch.running].state = State::Ended;
  leave(launch);
}

/// Gives the host's thread to others until this thread is ready again.
void suspend(Launch& launch, State state) {
  Thread& self = launch.threads[launch.running];
  self.state = state;
  launch.scheduler.enter(self.fibre);
}

void wake(Launch& launch, int thread) {
  launch.threads[thread].state = State::Ready;
  launch.ready.push_back(thread);
}

/// Lets a warp's lanes go on that wait for each other and are all there.
void releaseLanes(Launch& launch, int warp, unsigned mask) {
  const int first = warp * 32;
  unsigned present = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0 || first + lane >= launch.count) continue;
    const Thread& t = launch.threads[first + lane];
    if (t.state == State::Ended) continue;
    if (t.state != State::InWarp || t.laneMask != mask) return;
    present |= 1u << lane;
  }
  uint64_t values[32] = {};
  const Thread* one = nullptr;
  for (int lane = 0; lane < 32; ++lane) {
    if ((present >> lane & 1) == 0) continue;
    const Thread& t = launch.threads[first + lane];
    if (one != nullptr && !(t.place == one->place)) return;  // a deadlock, which the scheduler reports
    one = &t;
    values[lane] = t.mine;
  }
  if (one == nullptr) return;
  if (one->ordersMemory && present == liveLanes()) launch.warpSync[warp] = shadow().tick();
  for (int lane = 0; lane < 32; ++lane) {
    if ((present >> lane & 1) == 0) continue;
    Thread& t = launch.threads[first + lane];
    std::copy(values, values + 32, t.lanes);
    t.present = present;
    wake(launch, first + lane);
  }
}

/// Nobody is ready: all wait at one barrier, or the kernel hangs.
bool releaseBarrier(Launch& launch) {
  const Thread* one = nullptr;
  std::string waiting;
  bool same = true;
  int total = 0;
  for (int i = 0; i < launch.count; ++i) {
    const Thread& t = launch.threads[i];
    if (t.state == State::Ended) continue;
    total += t.barrierValue;
    if (one == nullptr) one = &t;
    if (t.state != State::AtBarrier || !(t.place == one->place)) same = false;
  }
  if (one == nullptr) return false;
  if (!same) {
    std::string text = "threads wait for each other in different places:";
    std::vector<std::pair<std::string, int>> places;
    for (int i = 0; i < launch.count; ++i) {
      const Thread& t = launch.threads[i];
      if (t.state == State::Ended) continue;
      const std::string name = placeText(t.place) + (t.state == State::InWarp ? " (within a warp)" : " (barrier)");
      auto found = std::find_if(places.begin(), places.end(), [&](const auto& p) { return p.first == name; });
      if (found == places.end())
        places.emplace_back(name, 1);
      else
        found->second += 1;
    }
    for (const auto& [name, count] : places) text += " " + std::to_string(count) + " at " + name;
    launch.error = text + ", of " + std::to_string(launch.count) + " in block " + std::to_string(launch.block);
    return false;
  }
  launch.barrier = shadow().tick();
  launch.barrierTotal = total;
  for (int i = 0; i < launch.count; ++i) {
    if (launch.threads[i].state == State::AtBarrier) wake(launch, i);
  }
  return true;
}

void runBlock(Launch& launch) {
  launch.blockBegan = launch.barrier = shadow().tick();
  for (uint64_t& t : launch.warpSync) t = launch.blockBegan;
  launch.ready.clear();
  for (int i = 0; i < launch.count; ++i) {
    Thread& t = launch.threads[i];
    t.fibre.prepare(stacks + static_cast<size_t>(i) * kStackBytes, threadMain);
    wake(launch, i);
  }
  for (;;) {
    if (launch.ready.empty() && !releaseBarrier(launch)) return;
    const size_t pick = draw(launch.ready.size());
    std::swap(launch.ready[pick], launch.ready.back());
    launch.running = launch.ready.back();
    launch.ready.pop_back();
    Thread& t = launch.threads[launch.running];
    threadIdx = t.index;
    t.fibre.enter(launch.scheduler);
    if (!launch.error.empty()) return;
    if (t.state != State::Ended) continue;
    // A lane less to wait for.
    const int warp = launch.running / 32;
    for (int lane = 0; lane < 32; ++lane) {
      const int other = warp * 32 + lane;
      if (other < launch.count && launch.threads[other].state == State::InWarp) {
        releaseLanes(launch, warp, launch.threads[other].laneMask);
      }
    }
  }
}

struct TlsBlock {
  uintptr_t code;  // an address in this library
  char* data = nullptr;
  size_t bytes = 0;
};

int findTls(dl_phdr_info* info, size_t, void* context) {
  auto& found = *static_cast<TlsBlock*>(context);
  bool mine = false;
  size_t bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type == PT_LOAD && found.code - info->dlpi_addr - segment.p_vaddr < segment.p_memsz) mine = true;
    if (segment.p_type == PT_TLS) bytes = segment.p_memsz;
  }
  if (!mine) return 0;
  found.data = static_cast<char*>(info->dlpi_tls_data);
  found.bytes = bytes;
  return 1;
}

Accessor accessor(const Launch& launch) {
  const auto thread = static_cast<uint16_t>(launch.running);
  return {launch.block, thread, launch.blockBegan, launch.barrier, launch.warpSync[thread / 32]};
}

}  // namespace

Shadow& shadow() {
  static auto* s = new Shadow();
  return *s;
}
void lockEmulation() { mutex().lock(); }
void unlockEmulation() { mutex().unlock(); }

void setSeed(uint64_t seed) {
  std::lock_guard<std::mutex> lock(mutex());
  random = seed * 2654435769u + 1;
}

void allocated(void* data, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex());
  shadow().allocated(static_cast<char*>(data), bytes);
  std::memset(data, 0xff, bytes);  // NaN in every float
}

void* dynamicShared() { return dynamic; }

void noteAccess(void* at, size_t bytes, bool write, void* place) {
  if (launched == nullptr) {
    const size_t offset = static_cast<size_t>(static_cast<char*>(at) - shadow().arena().base);
    if (offset >= shadow().arena().bytes) return;
    std::fprintf(stderr, "[emulation] code of the host touches device memory%s\n", lineOf(place).c_str());
    std::abort();  // as it would end on a machine with a GPU
  }
  const std::string problem = shadow().access(accessor(*launched), at, bytes, write, false);
  if (!problem.empty()) failAt(problem + lineOf(place));
}

void atomicAccess(void* at, size_t bytes) {
  const std::string problem = shadow().access(accessor(*launched), at, bytes, true, true);
  if (!problem.empty()) failAt(problem + ", in an atomic operation" + lineOf(__builtin_return_address(0)));
}

void failAt(const std::string& what) {
  if (launched == nullptr) return;
  Launch& launch = *launched;
  launch.error = "thread " + indexText(threadIdx) + " of block " + indexText(blockIdx) + " " + what;
  leave(launch);
}
void failThread(const char* message) {
  failAt(message);
  std::abort();
}

void fence() { shadow().fence(launched->block); }

unsigned laneIndex() { return static_cast<unsigned>(launched->running) % 32; }

unsigned liveLanes() {
  const Launch& launch = *launched;
  const int first = launch.running / 32 * 32;
  unsigned live = 0;
  for (int lane = 0; lane < 32 && first + lane < launch.count; ++lane) {
    if (launch.threads[first + lane].state != State::Ended) live |= 1u << lane;
  }
  return live;
}

int blockBarrier(const char* file, int line, int value, char kind) {
  Launch& launch = *launched;
  Thread& self = launch.threads[launch.running];
  self.place = {file, line};
  self.barrierValue = kind == '+' ? value : 0;
  suspend(launch, State::AtBarrier);
  return launch.barrierTotal;
}

const uint64_t* gatherLanes(const char* file, int line, unsigned mask, uint64_t mine, unsigned* present,
                            bool ordersMemory) {
  Launch& launch = *launched;
  Thread& self = launch.threads[launch.running];
  if ((mask >> laneIndex() & 1) == 0) failThread("names a mask of lanes that it is not in");
  self.place = {file, line};
  self.laneMask = mask;
  self.ordersMemory = ordersMemory;
  self.mine = mine;
  self.state = State::InWarp;
  releaseLanes(launch, launch.running / 32, mask);
  launch.scheduler.enter(self.fibre);
  *present = self.present;
  return self.lanes;
}

cudaError_t launch(cudaStream_t stream, dim3 grid, dim3 block, size_t sharedBytes,
                   const std::function<void()>& kernel) {
  static auto* state = new Launch();
  settle(stream);
  const uint64_t count = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (count == 0 || count > kMaxThreads || block.z > 64 || blocks == 0 || grid.y > 65535 || grid.z > 65535 ||
      sharedBytes > (size_t{227} << 10)) {
    return cudaErrorInvalidConfiguration;
  }
  std::lock_guard<std::mutex> lock(mutex());
  launched = state;  // first, which also makes this thread's block of thread-local memory exist
  if (stacks == nullptr) {
    stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  TlsBlock tls{reinterpret_cast<uintptr_t>(&dynamicShared)};
  dl_iterate_phdr(findTls, &tls);
  shadow().setStatic(tls.data, tls.bytes);
  shadow().setDynamic(dynamic, sharedBytes, kDynamicShared);
  shadow().beginLaunch(blocks);
  state->kernel = &kernel;
  state->count = static_cast<int>(count);
  state->error.clear();
  for (int i = 0; i < state->count; ++i) {
    const auto u = static_cast<unsigned>(i);
    state->threads[i].index = {u % block.x, u / block.x % block.y, u / block.x / block.y};
  }
  blockDim = block;
  gridDim = grid;
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
  for (const uint32_t index : order) {
    state->block = index;
    blockIdx = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
    runBlock(*state);
    if (!state->error.empty()) break;
  }
  launched = nullptr;
  if (!state->error.empty()) throw Error("ERR_NATIVE", "emulation", state->error);
  return cudaSuccess;
}

}  // namespace viaduct::emulation
