// Opening cuDNN, and its functions under their own names; see cudnn_library.h. Those of NVRTC are named by an engine of
// cudnn-frontend that nothing here uses; cuDNN opens NVRTC by itself. Not emulated: see emulation/attention_cudnn_host.cc.
#include "cudnn_library.h"

#include <cudnn.h>
#include <nvrtc.h>

#include <memory>
#include <mutex>

#include "libraries.h"

namespace viaduct::cuda {

namespace {

struct State {
  std::mutex mutex;
  std::vector<std::string> folders;
  DynamicLibrary cudnn{"cuDNN", kCudnnFile};
  DynamicLibrary nvrtc{"NVRTC", kNvrtcFile};
};

/// Of the process; never destroyed, because streams may run while it exits.
State& state() {
  static auto* s = new State();
  return *s;
}

template <typename F>
F cudnnFunction(const char* name) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  s.cudnn.open(s.folders);
  F function = nullptr;
  s.cudnn.find(name, &function);
  return function;
}

template <typename F>
F nvrtcFunction(const char* name) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  s.nvrtc.open(s.folders);
  F function = nullptr;
  s.nvrtc.find(name, &function);
  return function;
}

}  // namespace

void cudnnOptions(const DeviceOptions& options) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  s.folders = options.libraryFolders;
}

void openCudnn() {
  const size_t version = cudnnGetVersion();
  VIADUCT_CHECK(version >= 91002, "ERR_UNSUPPORTED", "cuda",
                "expected cuDNN 9.10.2 or newer, got " + cudnnName() + ": npm run build:cuda brings one");
}

std::string cudnnName() {
  const size_t version = cudnnGetVersion();
  return "cuDNN " + std::to_string(version / 10000) + "." + std::to_string(version % 10000 / 100) + "." +
         std::to_string(version % 100);
}

}  // namespace viaduct::cuda

// The function of the open library, found at its first call.
#define VIADUCT_CUDNN(name) static const auto call = viaduct::cuda::cudnnFunction<decltype(&name)>(#name)
#define VIADUCT_NVRTC(name) static const auto call = viaduct::cuda::nvrtcFunction<decltype(&name)>(#name)

extern "C" {

size_t cudnnGetVersion() {
  VIADUCT_CUDNN(cudnnGetVersion);
  return call();
}

const char* cudnnGetErrorString(cudnnStatus_t status) {
  VIADUCT_CUDNN(cudnnGetErrorString);
  return call(status);
}

void cudnnGetLastErrorString(char* message, size_t bytes) {
  VIADUCT_CUDNN(cudnnGetLastErrorString);
  call(message, bytes);
}

cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) {
  VIADUCT_CUDNN(cudnnCreate);
  return call(handle);
}

cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
  VIADUCT_CUDNN(cudnnSetStream);
  return call(handle, stream);
}

cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t* stream) {
  VIADUCT_CUDNN(cudnnGetStream);
  return call(handle, stream);
}

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t* descriptor) {
  VIADUCT_CUDNN(cudnnBackendCreateDescriptor);
  return call(type, descriptor);
}

cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
  VIADUCT_CUDNN(cudnnBackendDestroyDescriptor);
  return call(descriptor);
}

cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t descriptor) {
  VIADUCT_CUDNN(cudnnBackendFinalize);
  return call(descriptor);
}

cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t count, const void* values) {
  VIADUCT_CUDNN(cudnnBackendSetAttribute);
  return call(descriptor, name, type, count, values);
}

cudnnStatus_t cudnnBackendGetAttribute(const cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t wanted, int64_t* count, void* values) {
  VIADUCT_CUDNN(cudnnBackendGetAttribute);
  return call(descriptor, name, type, wanted, count, values);
}

cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t plan, cudnnBackendDescriptor_t data) {
  VIADUCT_CUDNN(cudnnBackendExecute);
  return call(handle, plan, data);
}

nvrtcResult nvrtcCreateProgram(nvrtcProgram* program, const char* source, const char* name, int count,
                               const char* const* headers, const char* const* names) {
  VIADUCT_NVRTC(nvrtcCreateProgram);
  return call(program, source, name, count, headers, names);
}

nvrtcResult nvrtcDestroyProgram(nvrtcProgram* program) {
  VIADUCT_NVRTC(nvrtcDestroyProgram);
  return call(program);
}

nvrtcResult nvrtcCompileProgram(nvrtcProgram program, int count, const char* const* options) {
  VIADUCT_NVRTC(nvrtcCompileProgram);
  return call(program, count, options);
}

nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram program, size_t* bytes) {
  VIADUCT_NVRTC(nvrtcGetProgramLogSize);
  return call(program, bytes);
}

nvrtcResult nvrtcGetProgramLog(nvrtcProgram program, char* log) {
  VIADUCT_NVRTC(nvrtcGetProgramLog);
  return call(program, log);
}

nvrtcResult nvrtcGetCUBINSize(nvrtcProgram program, size_t* bytes) {
  VIADUCT_NVRTC(nvrtcGetCUBINSize);
  return call(program, bytes);
}

nvrtcResult nvrtcGetCUBIN(nvrtcProgram program, char* code) {
  VIADUCT_NVRTC(nvrtcGetCUBIN);
  return call(program, code);
}

}  // extern "C"
