// The CPU backend's memory, streams and description. Ops are in the files that cpu_backend.h names.
#include "cpu_backend.h"

#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "../caching_allocator.h"
#include "../worker_stream.h"
#include "host_pages.h"
#include "matmul.h"
#include "parallel.h"

namespace viaduct::cpu {

struct CpuBackend::Memory {
  HostPages pages;
  CachingAllocator allocator{pages};
  std::mutex mutex;
  std::set<WorkerStream*> streams;

  /// Waits for all streams, so that every free block may serve any of them. Not from a stream's own thread.
  bool settleAll() {
    if (WorkerStream::onWorker()) return false;
    std::lock_guard<std::mutex> lock(mutex);
    for (WorkerStream* stream : streams) stream->drain();
    allocator.settle(0);
    return true;
  }
};

CpuBackend::CpuBackend() : arena_(std::make_unique<Memory>()) {}
CpuBackend::~CpuBackend() = default;

std::string CpuBackend::describe() const {
  return std::string("CPU, ") + simdTarget() + ", matmul by " + matmulEngine(DType::F32) + ", of bfloat16 by " +
         matmulEngine(DType::BF16) + ", " + std::to_string(numThreads()) + (numThreads() == 1 ? " thread" : " threads");
}

void* CpuBackend::allocate(size_t bytes, Stream& stream) {
  try {
    return arena_->allocator.allocate(bytes, stream.id());
  } catch (const Error&) {
    if (!arena_->settleAll()) throw;
    return arena_->allocator.allocate(bytes, stream.id());
  }
}

void CpuBackend::release(void* memory, Stream& stream) { arena_->allocator.release(memory, stream.id()); }

MemoryStats CpuBackend::memory() const { return arena_->allocator.stats(); }

void CpuBackend::resetPeak() { arena_->allocator.resetPeak(); }

void CpuBackend::setMemoryLimit(int64_t bytes) { arena_->allocator.setLimit(bytes); }

int64_t CpuBackend::trim() { return arena_->settleAll() ? arena_->allocator.trim() : 0; }

void CpuBackend::upload(Stream& s, Out y, std::shared_ptr<const void> hostBytes, size_t bytes) {
  s.enqueue("upload", [y, hostBytes = std::move(hostBytes), bytes] { std::memcpy(y.data, hostBytes.get(), bytes); });
}

void CpuBackend::download(Stream& s, std::shared_ptr<void> hostBytes, In x, size_t bytes) {
  s.enqueue("download", [x, hostBytes = std::move(hostBytes), bytes] { std::memcpy(hostBytes.get(), x.data, bytes); });
}

std::unique_ptr<Stream> CpuBackend::createStream(int64_t id) {
  Memory* memory = arena_.get();
  auto stream = std::make_unique<WorkerStream>(id, [memory, id](WorkerStream* self) {
    std::lock_guard<std::mutex> lock(memory->mutex);
    memory->streams.erase(self);
    memory->allocator.settle(id);
  });
  std::lock_guard<std::mutex> lock(memory->mutex);
  memory->streams.insert(stream.get());
  return stream;
}

void CpuBackend::setNumThreads(int64_t n) {
  VIADUCT_CHECK(n >= 1 && n <= 4096, "ERR_USAGE", "setNumThreads",
                "expected 1 to 4096 threads, got " + std::to_string(n));
  cpu::setNumThreads(static_cast<int>(n));
}

int64_t CpuBackend::numThreads() const { return cpu::numThreads(); }

bool CpuBackend::supports(const std::string& op, DType dtype, std::string* why) const {
  enum Takes { AnyType, Float, Float32 };
  static const std::map<std::string, Takes> table = {
      {"fill", AnyType},
      {"copy", AnyType},
      {"add", Float},
      {"mul", Float},
      {"accumulate", Float},
      {"scale", Float},
      {"clamp", Float},
      {"clampBackward", Float},
      {"sum", Float},
      {"sumRows", Float},
      {"addBias", Float},
      {"matmul", Float},
      {"matmulRows", Float},
      {"rmsNormForward", Float},
      {"rmsNormBackwardInput", Float},
      {"rmsNormBackwardWeight", Float},
      {"layerNormForward", Float},
      {"layerNormBackwardInput", Float},
      {"layerNormBackwardWeight", Float},
      {"rope", Float},
      {"attentionForward", Float},
      {"attentionBackward", Float},
      {"mergeAttention", Float},
      {"gatedActivationForward", Float},
      {"gatedActivationBackward", Float},
      {"activationForward", Float},
      {"activationBackward", Float},
      {"matmulActivation", Float},
      {"attentionSink", Float},
      {"attentionSinkBackward", Float},
      {"groupedMatmul", Float},
      {"groupedMatmulWeights", Float},
      {"routerForward", Float},
      {"routerBackward", Float},
      {"balanceScores", Float32},
      {"jitter", Float},
      {"expertCounts", AnyType},
      {"capExperts", AnyType},
      {"expertOrder", AnyType},
      {"expertSlots", AnyType},
      {"spreadRows", Float},
      {"combineRows", Float},
      {"combineRowsBackwardWeights", Float},
      {"embeddingForward", Float},
      {"embeddingBackward", Float},
      {"crossEntropyStats", Float},
      {"crossEntropyCombine", Float32},
      {"crossEntropyBackward", Float},
      {"sumSquares", Float32},
      {"clipFactor", Float32},
      {"adamw", Float32},
      {"dropout", Float},
      {"randomNormal", Float},
      {"argmax", Float},
  };
  const auto found = table.find(op);
  if (found == table.end()) {
    if (why != nullptr) *why = op + " is not an op of the CPU backend";
    return false;
  }
  const bool isFloat = dtype == DType::F32 || dtype == DType::BF16;
  const bool ok = found->second == AnyType || (found->second == Float ? isFloat : dtype == DType::F32);
  if (!ok && why != nullptr) {
    *why = op + " on the CPU takes " + (found->second == Float ? "float32 or bfloat16" : "float32") + ", not " +
           dtypeName(dtype);
  }
  return ok;
}

}  // namespace viaduct::cpu

namespace viaduct {

std::unique_ptr<Backend> createCpuBackend() { return std::make_unique<cpu::CpuBackend>(); }

}  // namespace viaduct
