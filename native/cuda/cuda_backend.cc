// The CUDA backend's memory, streams, host copies and description. Ops are in the files that cuda_backend.h names.
#include "cuda_backend.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "attention_engine.h"
#include "matmul.h"
#include "nccl_library.h"

namespace viaduct::cuda {

namespace {

std::map<std::string, Takes>& supported() {
  static std::map<std::string, Takes> table;
  return table;
}

std::string versionText(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

Support::Support(std::initializer_list<std::pair<const char*, Takes>> ops) {
  for (const auto& [op, takes] : ops) supported()[op] = takes;
}

CudaBackend::CudaBackend(const DeviceOptions& options)
    : options_(options), device_(options.ordinal), pieces_(device_), allocator_(pieces_) {
  matmulOptions(options);
  sdpaOptions(options);
  ncclOptions(options);
#ifdef VIADUCT_EMULATE
  emulation::setSeed(options.seed);
#endif
}

CudaBackend::~CudaBackend() = default;

std::string CudaBackend::describe() const {
  const cudaDeviceProp& p = device_.properties();
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  return std::string(p.name) + ", compute capability " + std::to_string(p.major) + "." + std::to_string(p.minor) +
         ", " + std::to_string(p.multiProcessorCount) + " multiprocessors, " + std::to_string(p.totalGlobalMem >> 30) +
         " GiB; driver for CUDA " + versionText(driver) + ", built with " + versionText(runtime) + "; matmul by " +
         matmulLibrary() + (matmulTuned() ? ", tuned" : "") + ", attention by " + attentionLibrary();
}

void* CudaBackend::allocate(size_t bytes, Stream& stream) {
#ifdef VIADUCT_EMULATE
  const size_t size = bytes + 512;  // what lies behind a tensor is nobody's, so that an access out of bounds shows
#else
  const size_t size = bytes;
#endif
  void* memory = nullptr;
  try {
    memory = allocator_.allocate(size, stream.id());
  } catch (const Error&) {
    if (!settleAll()) throw;
    memory = allocator_.allocate(size, stream.id());
  }
#ifdef VIADUCT_EMULATE
  // In the stream's order: commands on what lay there before may still wait.
  cudaStream(stream).always("allocate", [memory, bytes, on = cudaStream(stream).get()] {
    emulation::settle(on);
    emulation::allocated(memory, bytes);
  });
#endif
  return memory;
}

void CudaBackend::release(void* memory, Stream& stream) { allocator_.release(memory, stream.id()); }

MemoryStats CudaBackend::memory() const { return allocator_.stats(); }

void CudaBackend::resetPeak() { allocator_.resetPeak(); }

void CudaBackend::setMemoryLimit(int64_t bytes) { allocator_.setLimit(bytes); }

int64_t CudaBackend::trim() { return settleAll() ? allocator_.trim() : 0; }

/// Waits for all streams, so that every free block may serve any of them. Not from a stream's own thread.
bool CudaBackend::settleAll() {
  if (WorkerStream::onWorker()) return false;
  std::lock_guard<std::mutex> lock(mutex_);
  for (WorkerStream* stream : streams_) stream->drain();
  allocator_.settle(0);
  return true;
}

void CudaBackend::upload(Stream& s, Out y, std::shared_ptr<const void> hostBytes, size_t bytes) {
  CudaStream& stream = cudaStream(s);
  s.enqueue("upload", [&stream, y, hostBytes = std::move(hostBytes), bytes] {
    for (size_t at = 0; at < bytes; at += kPinnedBytes) {
      const size_t size = std::min(kPinnedBytes, bytes - at);
      auto staging = stream.device().pinned(size);
      std::memcpy(staging->data(), static_cast<const char*>(hostBytes.get()) + at, size);
      check(cudaMemcpyAsync(y.as<char>() + at, staging->data(), size, cudaMemcpyHostToDevice, stream.get()), "upload");
      stream.whenPassed([staging](std::exception_ptr) {});
    }
  });
}

void CudaBackend::download(Stream& s, std::shared_ptr<void> hostBytes, In x, size_t bytes) {
  CudaStream& stream = cudaStream(s);
  s.enqueue("download", [&stream, x, hostBytes = std::move(hostBytes), bytes] {
    for (size_t at = 0; at < bytes; at += kPinnedBytes) {
      const size_t size = std::min(kPinnedBytes, bytes - at);
      auto staging = stream.device().pinned(size);
      check(cudaMemcpyAsync(staging->data(), x.as<char>() + at, size, cudaMemcpyDeviceToHost, stream.get()),
            "download");
      stream.whenPassed([staging, hostBytes, at, size](std::exception_ptr error) {
        if (error == nullptr) std::memcpy(static_cast<char*>(hostBytes.get()) + at, staging->data(), size);
      });
    }
  });
}

void CudaBackend::copyRows(void* to, size_t toPitch, const void* from, size_t fromPitch, size_t width, size_t rows,
                           bool toHost) {
  device_.makeCurrent();
  const cudaMemcpyKind kind = toHost ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
  if (rows == 1 || (toPitch == width && fromPitch == width)) {
    return check(cudaMemcpy(to, from, width * rows, kind), "cudaMemcpy");
  }
  check(cudaMemcpy2D(to, toPitch, from, fromPitch, width, rows, kind), "cudaMemcpy2D");
}

/// The host's memory is not pinned: the driver stages it, and a copy down ends before the worker goes on.
void CudaBackend::copyBetween(Stream& s, Out y, In x, bool toHost) {
  CudaStream& stream = cudaStream(s);
  const size_t bytes = static_cast<size_t>(x.numel()) * dtypeBytes(x.dtype);
  if (bytes == 0) return;
  s.enqueue("copyBetween", [&stream, y, x, bytes, kind = toHost ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice] {
    check(cudaMemcpyAsync(y.data, x.data, bytes, kind, stream.get()), "copyBetween");
  });
}

std::unique_ptr<Stream> CudaBackend::createStream(int64_t id) {
  auto stream = std::make_unique<CudaStream>(id, device_, [this, id](WorkerStream* self) {
    std::lock_guard<std::mutex> lock(mutex_);
    streams_.erase(self);
    allocator_.settle(id);
  });
  std::lock_guard<std::mutex> lock(mutex_);
  streams_.insert(stream.get());
  return stream;
}

/// Threads are the CPU's; a GPU has none to set.
void CudaBackend::setNumThreads(int64_t n) {
  VIADUCT_CHECK(n >= 1 && n <= 4096, "ERR_USAGE", "setNumThreads",
                "expected 1 to 4096 threads, got " + std::to_string(n));
}

bool CudaBackend::supports(const std::string& op, DType dtype, std::string* why) const {
  const auto found = supported().find(op);
  if (found == supported().end()) {
    if (why != nullptr) *why = op + " is not built for CUDA";
    return false;
  }
  const bool isFloat = dtype == DType::F32 || dtype == DType::BF16 || dtype == DType::F16;
  const Takes takes = found->second;
  const bool ok = takes == Takes::AnyType || (takes == Takes::Float ? isFloat : dtype == DType::F32);
  if (!ok && why != nullptr) {
    *why = op + " on CUDA takes " + (takes == Takes::Float ? "float32, bfloat16 or float16" : "float32") + ", not " +
           dtypeName(dtype);
  }
  return ok;
}

}  // namespace viaduct::cuda
