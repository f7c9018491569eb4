// Opening NVIDIA's libraries; see libraries.h.
#include "libraries.h"

#include <dlfcn.h>
#include <sys/stat.h>

#include "../errors.h"

namespace viaduct::cuda {

void DynamicLibrary::open(const std::vector<std::string>& folders) {
  if (handle_ != nullptr) return;
  std::string where;
  std::string why;
  std::vector<std::string> paths;
  for (const std::string& folder : folders) {
    const std::string path = folder + "/" + file_;
    struct stat info;
    if (stat(path.c_str(), &info) == 0) paths.push_back(path);
    where += (where.empty() ? "" : ", ") + folder;
  }
  paths.emplace_back(file_);
  for (const std::string& path : paths) {
    handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_ != nullptr) return;
    const char* error = dlerror();
    if (why.empty() && error != nullptr) why = error;
  }
  throw Error("ERR_UNSUPPORTED", "cuda",
              std::string("expected ") + title_ + " (" + file_ + "), got \"" + why + "\"; looked in " +
                  (where.empty() ? "" : where + " and ") +
                  "the loader's places: npm run build:cuda brings it, or name its folder in LD_LIBRARY_PATH");
}

void* DynamicLibrary::symbol(const char* name) const {
  void* address = dlsym(handle_, name);
  VIADUCT_CHECK(address != nullptr, "ERR_UNSUPPORTED", "cuda",
                std::string("expected ") + title_ + " with " + name + ", got one without: take a newer version");
  return address;
}

namespace {

template <typename F>
LibraryFact fact(const char* title, const char* file, const std::vector<std::string>& folders, F version) {
  try {
    DynamicLibrary library(title, file);
    library.open(folders);
    return {title, version(library), ""};
  } catch (const Error& e) {
    return {title, "", e.what()};
  }
}

std::string dotted(size_t version, size_t major, size_t minor) {
  return std::to_string(version / major) + "." + std::to_string(version % major / minor) + "." +
         std::to_string(version % minor);
}

}  // namespace

std::vector<LibraryFact> libraryFacts(const std::vector<std::string>& folders) {
  return {fact("cuBLASLt", kCublasLtFile, folders,
               [](const DynamicLibrary& library) {
                 size_t (*version)() = nullptr;
                 library.find("cublasLtGetVersion", &version);
                 return dotted(version(), 10000, 100);
               }),
          fact("cuBLAS", kCublasFile, folders,
               [](const DynamicLibrary& library) {
                 int (*property)(int, int*) = nullptr;
                 library.find("cublasGetProperty", &property);
                 std::string version;
                 for (int part = 0; part < 3; ++part) {  // major, minor, patch
                   int number = 0;
                   property(part, &number);
                   version += (part == 0 ? "" : ".") + std::to_string(number);
                 }
                 return version;
               }),
          fact("cuDNN", kCudnnFile, folders,
               [](const DynamicLibrary& library) {
                 size_t (*version)() = nullptr;
                 library.find("cudnnGetVersion", &version);
                 return dotted(version(), 10000, 100);
               }),
          fact("NCCL", kNcclFile, folders, [](const DynamicLibrary& library) {
            int (*version)(int*) = nullptr;
            library.find("ncclGetVersion", &version);
            int code = 0;
            version(&code);
            return dotted(static_cast<size_t>(code), 10000, 100);
          })};
}

}  // namespace viaduct::cuda
