// What the plug-in library exports; see ../plugin.h. Of a library that emulates a GPU too.
#include "../plugin.h"

#include ".viaduct/interface.h"
#include "cuda_backend.h"
#include "libraries.h"
#include "nccl_comm.h"

#define VIADUCT_EXPORT extern "C" __attribute__((visibility("default")))

namespace viaduct::cuda {

namespace {

class CudaPlugin final : public Plugin {
 public:
  int deviceCount(std::string* why) override {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess) return count;
    cudaGetLastError();
    *why = errorText(status);
    return 0;
  }
  std::vector<LibraryFact> libraries(const std::vector<std::string>& folders) override { return libraryFacts(folders); }
  std::unique_ptr<Backend> open(const DeviceOptions& options) override {
    return std::make_unique<CudaBackend>(options);
  }
  std::unique_ptr<Communicator> connect(Backend& device, const DeviceGroupOptions& options) override {
    return connectNccl(static_cast<CudaBackend&>(device), options);
  }
};

}  // namespace

}  // namespace viaduct::cuda

VIADUCT_EXPORT const char* viaductPluginInterface() { return VIADUCT_INTERFACE; }

VIADUCT_EXPORT viaduct::Plugin* viaductPlugin() {
  static auto* plugin = new viaduct::cuda::CudaPlugin();
  return plugin;
}
