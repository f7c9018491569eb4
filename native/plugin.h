// A device that lives in a shared library of its own, opened at run time: what the library exports and how the addon opens it.
// Both sides are C++ of one compiler; a hash of the headers that they share (deploy/interface.mjs) tells when they are not.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "comm.h"

namespace viaduct {

/// How lib/tensor/device.ts wants a device of a plug-in.
struct DeviceOptions {
  int ordinal = 0;                          // which of the devices that this process sees
  std::vector<std::string> libraryFolders;  // where the vendor's libraries may lie, before the loader's own places
  uint64_t seed = 0;                        // order of threads, for a plug-in that emulates a device
};

/// One of the vendor's libraries: its version, or why it cannot be used.
struct LibraryFact {
  std::string name;
  std::string version;
  std::string why;
};

/// How ranks meet for the memory of their devices.
struct DeviceGroupOptions {
  std::shared_ptr<Communicator> host;  // the same ranks; carries host values
  std::shared_ptr<Store> store;
  std::string key;  // names the group in the store: another for each group and attempt
  int64_t timeoutMs = 600000;
};

class Plugin {
 public:
  virtual ~Plugin() = default;
  /// Devices that this process may use; `why` says more when there are none.
  virtual int deviceCount(std::string* why) = 0;
  virtual std::vector<LibraryFact> libraries(const std::vector<std::string>& folders) = 0;
  /// Throws ERR_UNSUPPORTED when there is no such device.
  virtual std::unique_ptr<Backend> open(const DeviceOptions& options) = 0;
  /// The communicator for tensors of `device`, which this plug-in opened. Every rank of the group calls it. Returns at once:
  /// operations wait until all ranks have connected. Throws ERR_UNSUPPORTED when the vendor's library is missing.
  virtual std::unique_ptr<Communicator> connect(Backend& device, const DeviceGroupOptions& options) = 0;
};

constexpr const char* kPluginInterfaceSymbol = "viaductPluginInterface";  // const char* ()
constexpr const char* kPluginSymbol = "viaductPlugin";                    // viaduct::Plugin* (), never freed

/// Opens the library at `path`, once a process. Throws ERR_ADDON when it does not load or was built from other headers.
Plugin& loadPlugin(const std::string& path);

/// A device of the plug-in at `path`.
std::unique_ptr<Backend> openPluginDevice(const std::string& path, const DeviceOptions& options);
/// The plug-in that opened the device; throws ERR_UNSUPPORTED for another's.
Plugin& pluginOf(const Backend& device);

}  // namespace viaduct
