// Opening a plug-in; see plugin.h.
#include "plugin.h"

#include <dlfcn.h>

#include <map>
#include <mutex>

#include ".viaduct/interface.h"

namespace viaduct {

namespace {

[[noreturn]] void refuse(const std::string& path, const std::string& got) {
  throw Error("ERR_ADDON", "plugin",
              "expected " + path + " to be a device plug-in of this build, got " + got + ": npm run build:cuda");
}

Plugin* open(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = dlerror();
    refuse(path, std::string("\"") + (why == nullptr ? "?" : why) + "\"");
  }
  auto* interface = reinterpret_cast<const char* (*)()>(dlsym(library, kPluginInterfaceSymbol));
  auto* plugin = reinterpret_cast<Plugin* (*)()>(dlsym(library, kPluginSymbol));
  if (interface == nullptr || plugin == nullptr) refuse(path, "a library without " + std::string(kPluginSymbol));
  if (std::string(interface()) != VIADUCT_INTERFACE) {
    refuse(path, std::string("one for interface ") + interface() + ", the addon has " + VIADUCT_INTERFACE);
  }
  return plugin();
}

/// Which plug-in opened which device. Never destroyed, as the devices are not.
struct Openers {
  std::mutex mutex;
  std::map<const Backend*, Plugin*> plugins;
};

Openers& openers() {
  static auto* all = new Openers();
  return *all;
}

}  // namespace

Plugin& loadPlugin(const std::string& path) {
  static std::mutex mutex;
  static auto* loaded =
      new std::map<std::string, Plugin*>();  // never unloaded: streams may run while the process exits
  std::lock_guard<std::mutex> lock(mutex);
  auto found = loaded->find(path);
  if (found == loaded->end()) found = loaded->emplace(path, open(path)).first;
  return *found->second;
}

std::unique_ptr<Backend> openPluginDevice(const std::string& path, const DeviceOptions& options) {
  Plugin& plugin = loadPlugin(path);
  std::unique_ptr<Backend> device = plugin.open(options);
  std::lock_guard<std::mutex> lock(openers().mutex);
  openers().plugins[device.get()] = &plugin;
  return device;
}

Plugin& pluginOf(const Backend& device) {
  std::lock_guard<std::mutex> lock(openers().mutex);
  const auto found = openers().plugins.find(&device);
  VIADUCT_CHECK(found != openers().plugins.end(), "ERR_UNSUPPORTED", "plugin",
                std::string("expected a device of a plug-in, got ") + device.name());
  return *found->second;
}

}  // namespace viaduct
