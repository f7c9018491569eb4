// A driver library for machines without one, so that cuDNN makes plans for GPUs that are not here: it takes the code that
// cuDNN compiled and hands out kernels which nothing can start. Every other call finds no GPU. For cudnn_plans.cc alone.
#include <cstring>

extern "C" {

constexpr int kSuccess = 0, kNoDevice = 100, kInvalidImage = 200;

// Addresses that nobody reads.
static char aLibrary, aKernel, aFunction;

int cuLibraryLoadData(void** library, const void* code, ...) {
  if (std::memcmp(code, "\177ELF", 4) != 0) return kInvalidImage;
  *library = &aLibrary;
  return kSuccess;
}
int cuLibraryUnload(void*) { return kSuccess; }
int cuLibraryGetKernel(void** kernel, void*, const char*) {
  *kernel = &aKernel;
  return kSuccess;
}
int cuKernelGetFunction(void** function, void*) {
  *function = &aFunction;
  return kSuccess;
}
int cuKernelSetAttribute(...) { return kSuccess; }
int cuFuncSetAttribute(...) { return kSuccess; }
int cuGetErrorName(int, const char** text) {
  *text = "an error of the stand-in";
  return kSuccess;
}
int cuGetErrorString(int, const char** text) {
  *text = "a driver that stands in for none";
  return kSuccess;
}

#define VIADUCT_NO_DEVICE(name) \
  int name(...) { return kNoDevice; }
VIADUCT_NO_DEVICE(cuInit)
VIADUCT_NO_DEVICE(cuDriverGetVersion)
VIADUCT_NO_DEVICE(cuDeviceGet)
VIADUCT_NO_DEVICE(cuDeviceGetCount)
VIADUCT_NO_DEVICE(cuDeviceGetAttribute)
VIADUCT_NO_DEVICE(cuDevicePrimaryCtxRetain)
VIADUCT_NO_DEVICE(cuDevicePrimaryCtxRelease)
VIADUCT_NO_DEVICE(cuDevicePrimaryCtxReset)
VIADUCT_NO_DEVICE(cuCtxGetCurrent)
VIADUCT_NO_DEVICE(cuCtxGetDevice)
VIADUCT_NO_DEVICE(cuCtxGetLimit)
VIADUCT_NO_DEVICE(cuCtxPopCurrent)
VIADUCT_NO_DEVICE(cuCtxPushCurrent)
VIADUCT_NO_DEVICE(cuStreamGetCtx)
VIADUCT_NO_DEVICE(cuStreamSynchronize)
VIADUCT_NO_DEVICE(cuLinkCreate)
VIADUCT_NO_DEVICE(cuLinkCreate_v2)
VIADUCT_NO_DEVICE(cuLinkAddData)
VIADUCT_NO_DEVICE(cuLinkAddData_v2)
VIADUCT_NO_DEVICE(cuLinkAddFile_v2)
VIADUCT_NO_DEVICE(cuLinkComplete)
VIADUCT_NO_DEVICE(cuLinkDestroy)
VIADUCT_NO_DEVICE(cuLaunchKernel)
VIADUCT_NO_DEVICE(cuLaunchKernelEx)
VIADUCT_NO_DEVICE(cuLaunchCooperativeKernel)
VIADUCT_NO_DEVICE(cuLibraryLoadFromFile)
VIADUCT_NO_DEVICE(cuKernelGetAttribute)
VIADUCT_NO_DEVICE(cuFuncGetAttribute)
VIADUCT_NO_DEVICE(cuModuleLoadData)
VIADUCT_NO_DEVICE(cuModuleLoadDataEx)
VIADUCT_NO_DEVICE(cuModuleLoadFatBinary)
VIADUCT_NO_DEVICE(cuModuleGetFunction)
VIADUCT_NO_DEVICE(cuModuleGetGlobal_v2)
VIADUCT_NO_DEVICE(cuModuleUnload)
VIADUCT_NO_DEVICE(cuMemcpyDtoH_v2)
VIADUCT_NO_DEVICE(cuTensorMapEncodeTiled)
VIADUCT_NO_DEVICE(cuOccupancyMaxActiveBlocksPerMultiprocessor)
VIADUCT_NO_DEVICE(cuOccupancyMaxPotentialClusterSize)

}  // extern "C"
