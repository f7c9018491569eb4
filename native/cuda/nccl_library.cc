// Opening NCCL; see nccl_library.h. What moves bytes between GPUs is not emulated: see emulation/nccl_host.cc.
#include "nccl_library.h"

#include <memory>
#include <mutex>

#include "libraries.h"

namespace viaduct::cuda {

namespace {

struct State {
  std::mutex mutex;
  std::vector<std::string> folders;
  DynamicLibrary library{"NCCL", kNcclFile};
  std::unique_ptr<Nccl> functions;
};

/// Of the process; never destroyed, because communicators may live while it exits.
State& state() {
  static auto* s = new State();
  return *s;
}

}  // namespace

void ncclOptions(const DeviceOptions& options) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (s.functions == nullptr) s.folders = options.libraryFolders;
}

const Nccl& nccl() {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  if (s.functions != nullptr) return *s.functions;
  s.library.open(s.folders);
  auto f = std::make_unique<Nccl>();
  s.library.find("ncclGetUniqueId", &f->getUniqueId);
  s.library.find("ncclCommInitRankConfig", &f->commInitRankConfig);
  s.library.find("ncclCommSplit", &f->commSplit);
  s.library.find("ncclCommGetAsyncError", &f->commGetAsyncError);
  s.library.find("ncclCommFinalize", &f->commFinalize);
  s.library.find("ncclCommDestroy", &f->commDestroy);
  s.library.find("ncclCommAbort", &f->commAbort);
  s.library.find("ncclGetErrorString", &f->getErrorString);
  s.library.find("ncclGetLastError", &f->getLastError);
  s.library.find("ncclGroupStart", &f->groupStart);
  s.library.find("ncclGroupEnd", &f->groupEnd);
  s.library.find("ncclAllReduce", &f->allReduce);
  s.library.find("ncclAllGather", &f->allGather);
  s.library.find("ncclReduceScatter", &f->reduceScatter);
  s.library.find("ncclBroadcast", &f->broadcast);
  s.library.find("ncclSend", &f->send);
  s.library.find("ncclRecv", &f->recv);
  s.functions = std::move(f);
  return *s.functions;
}

}  // namespace viaduct::cuda
