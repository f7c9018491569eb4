// NVIDIA's libraries that are opened at run time, never linked: where they are found and which versions they have.
#pragma once

#include <string>
#include <vector>

#include "../plugin.h"

namespace viaduct::cuda {

/// One library. Nothing is opened before open().
class DynamicLibrary {
 public:
  /// `title`: "cuBLASLt"; `file`: its name with the version that the headers are of, "libcublasLt.so.13".
  DynamicLibrary(const char* title, const char* file) : title_(title), file_(file) {}

  /// Opens it from the first of `folders` that has it, else from the loader's places; once, later calls do nothing.
  /// Throws ERR_UNSUPPORTED that says where was looked and what to do.
  void open(const std::vector<std::string>& folders);
  /// A function of the open library. Throws ERR_UNSUPPORTED when it has none of that name.
  template <typename F>
  void find(const char* name, F* function) const {
    *function = reinterpret_cast<F>(symbol(name));
  }

 private:
  void* symbol(const char* name) const;

  const char* title_;
  const char* file_;
  void* handle_ = nullptr;
};

constexpr const char* kCublasLtFile = "libcublasLt.so.13";
constexpr const char* kCublasFile = "libcublas.so.13";
constexpr const char* kCudnnFile = "libcudnn.so.9";
constexpr const char* kNvrtcFile = "libnvrtc.so.13";  // of CUDA 13, as the wheels are
constexpr const char* kNcclFile = "libnccl.so.2";

/// cuBLASLt, cuBLAS, cuDNN and NCCL as they are here.
std::vector<LibraryFact> libraryFacts(const std::vector<std::string>& folders);

}  // namespace viaduct::cuda
