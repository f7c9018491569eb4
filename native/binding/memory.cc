// Rows for devices, memory and tensors: what the slot table and the backend can do besides ops.
#include "../plugin.h"
#include "bind.h"

namespace viaduct::binding {

namespace {

/// `cpu`; or `host`, the same processor beside a device: memory, counters and streams of its own.
int64_t openDevice(Env& env, const std::string& kind) {
  VIADUCT_CHECK(kind == "cpu" || kind == "host", "ERR_UNSUPPORTED", "openDevice",
                "expected cpu or host, got " + kind + ": a device of a plug-in is opened by openPlugin");
  return env.openDevice(kind, createCpuBackend);
}

/// A device of the plug-in at `path`; `seed` is for one that emulates.
int64_t openPlugin(Env& env, const std::string& path, int ordinal, std::vector<std::string> folders, int64_t seed) {
  return env.openDevice(path + ":" + std::to_string(ordinal), [&] {
    return openPluginDevice(path, {ordinal, std::move(folders), static_cast<uint64_t>(seed)});
  });
}

/// How many devices the plug-in at `path` finds on this machine, and why not more than none.
Value pluginDevices(const std::string& path) {
  std::string why;
  const int devices = loadPlugin(path).deviceCount(&why);
  return Value::Record{{"devices", devices}, {"why", why}};
}

/// The vendor's libraries that it would use; opens them.
Value pluginLibraries(const std::string& path, std::vector<std::string> folders) {
  std::vector<Value> libraries;
  for (LibraryFact& fact : loadPlugin(path).libraries(folders)) {
    libraries.push_back(Value::Record{{"name", fact.name}, {"version", fact.version}, {"why", fact.why}});
  }
  return Value(std::move(libraries));
}

Value deviceInfo(Backend& device) {
  return Value::Record{{"name", device.name()}, {"description", device.describe()}, {"threads", device.numThreads()}};
}

Value memoryStats(Backend& device) {
  const MemoryStats m = device.memory();
  return Value::Record{{"liveBytes", m.liveBytes},
                       {"peakBytes", m.peakBytes},
                       {"reservedBytes", m.reservedBytes},
                       {"liveBlocks", m.liveBlocks},
                       {"limitBytes", m.limitBytes}};
}

void resetPeak(Backend& device) { device.resetPeak(); }
void setMemoryLimit(Backend& device, int64_t bytes) { device.setMemoryLimit(bytes); }
int64_t trimMemory(Backend& device) { return device.trim(); }
void setNumThreads(Backend& device, int64_t n) { device.setNumThreads(n); }
void setMatmulEngine(Backend& device, const std::string& engine) { device.setMatmulEngine(engine); }
void setGroupedMatmulEngine(Backend& device, const std::string& engine) { device.setGroupedMatmulEngine(engine); }
void setAttentionEngine(Backend& device, const std::string& engine) { device.setAttentionEngine(engine); }
void allowNondeterministic(Backend& device, bool allowed) { device.allowNondeterministic(allowed); }

/// Empty text: supported; else the reason.
std::string supports(Backend& device, const std::string& op, DType dtype) {
  std::string why;
  if (device.supports(op, dtype, &why)) return "";
  return why.empty() ? op + " is not built for " + dtypeName(dtype) : why;
}

int64_t empty(Env& env, int64_t stream, const Dims& shape, DType dtype) {
  StreamEntry& entry = env.stream(stream);
  return env.slots.empty(*entry.backend, entry.stream, shape, dtype);
}

int64_t view(Env& env, int64_t handle, const Dims& shape, const Dims& strides, int64_t offset) {
  return env.slots.view(handle, shape, strides, offset);
}

void freeTensor(Env& env, int64_t handle) { env.slots.free(handle); }

Value tensorInfo(Env& env, int64_t handle) {
  const Slot& slot = env.slots.at(handle, "tensorInfo");
  const TensorRef& t = slot.tensor;
  const auto* begin = static_cast<const char*>(slot.storage->data());
  const int64_t offset = begin == nullptr ? 0 : static_cast<const char*>(t.data) - begin;
  return Value::Record{
      {"shape", std::vector<int64_t>(t.shape, t.shape + t.ndim)},
      {"strides", std::vector<int64_t>(t.stride, t.stride + t.ndim)},
      {"dtype", static_cast<int>(t.dtype)},
      {"offset", offset / static_cast<int64_t>(dtypeBytes(t.dtype))},
      {"storageBytes", static_cast<int64_t>(slot.storage->bytes())},
      {"address", static_cast<double>(reinterpret_cast<uintptr_t>(t.data))},
  };
}

int64_t version(Env& env, int64_t handle) { return env.slots.at(handle, "version").storage->version; }

/// Tensors (views included) and pins that hold the storage: 1 when it is this handle's alone.
int64_t sharers(Env& env, int64_t handle) { return env.slots.at(handle, "sharers").storage.use_count(); }

int64_t liveSlots(Env& env) { return env.slots.live(); }

size_t hostBytes(const TensorRef& t, const char* where) {
  VIADUCT_CHECK(t.contiguous(), "ERR_LAYOUT", where, "expected a contiguous tensor, got " + describe(t));
  return static_cast<size_t>(t.numel()) * dtypeBytes(t.dtype);
}

void upload(Env& env, Stream& stream, Out y, BytesIn bytes) {
  const size_t size = hostBytes(y, "upload");
  VIADUCT_CHECK(
      bytes.size == size, "ERR_SHAPE", "upload",
      "expected " + std::to_string(size) + " bytes for " + describe(y) + ", got " + std::to_string(bytes.size));
  if (size == 0) return;
  std::shared_ptr<uint8_t> copy(new uint8_t[size], std::default_delete<uint8_t[]>());
  std::memcpy(copy.get(), bytes.data, size);
  env.backendOf(stream).upload(stream, y, copy, size);
}

/// The buffer is made here and filled on the stream's thread, so that bytes are copied once. A reference keeps it until then.
Promise download(Env& env, Stream& stream, In x) {
  const size_t size = hostBytes(x, "download");
  VIADUCT_CHECK(size <= INT32_MAX, "ERR_SHAPE", "download",
                "expected at most 2147483647 bytes, got " + std::to_string(size) + ": download slices");
  napi_value buffer = nullptr;
  void* data = nullptr;
  if (napi_create_arraybuffer(env.raw(), size, &data, &buffer) != napi_ok || (size > 0 && data == nullptr)) {
    throw Error("ERR_OUT_OF_MEMORY", "download",
                "expected an ArrayBuffer of " + std::to_string(size) + " bytes, got none");
  }
  napi_ref reference = nullptr;
  napi_create_reference(env.raw(), buffer, 1, &reference);
  Deferred deferred = env.defer();
  if (size > 0) {
    std::shared_ptr<void> target(data, [](void*) {});
    env.backendOf(stream).download(stream, target, x, size);
  }
  stream.notify([deferred, reference, &env](std::exception_ptr error) {
    if (error != nullptr) {
      env.post([reference](Env& e) { napi_delete_reference(e.raw(), reference); });
      deferred.reject(error);
      return;
    }
    deferred.resolve(Value(Value::Make([reference](napi_env raw) {
      napi_value value = nullptr;
      napi_get_reference_value(raw, reference, &value);
      napi_delete_reference(raw, reference);
      return value;
    })));
  });
  return Promise{deferred.promise()};
}

void copyBetween(Env& env, Stream& stream, const PinnedOut& y, const Pinned& x) {
  Backend& device = env.backendOf(stream);
  const bool toHost = &x.pin->backend() == &device;
  const Backend& other = toHost ? y.pin->backend() : x.pin->backend();
  VIADUCT_CHECK((toHost || &y.pin->backend() == &device) && other.onHost(), "ERR_UNSUPPORTED", "copyBetween",
                std::string("expected a tensor of the stream's device and one of the host, got ") +
                    x.pin->backend().name() + " to " + y.pin->backend().name() + " on a stream of " + device.name());
  VIADUCT_CHECK(x.dtype == y.dtype && x.numel() == y.numel() && x.contiguous() && y.contiguous(), "ERR_SHAPE",
                "copyBetween", "expected contiguous tensors that are alike, got " + describe(x) + " to " + describe(y));
  Out to;
  In from;
  static_cast<TensorRef&>(to) = y;
  static_cast<TensorRef&>(from) = x;
  device.copyBetween(stream, to, from, toHost);
}

}  // namespace

std::vector<Row> memoryRows() {
  return {
      row("openDevice", &openDevice),
      row("openPlugin", &openPlugin),
      row("pluginDevices", &pluginDevices),
      row("pluginLibraries", &pluginLibraries),
      row("deviceInfo", &deviceInfo),
      row("memoryStats", &memoryStats),
      row("resetPeak", &resetPeak),
      row("setMemoryLimit", &setMemoryLimit),
      row("trimMemory", &trimMemory),
      row("setNumThreads", &setNumThreads),
      row("setMatmulEngine", &setMatmulEngine),
      row("setGroupedMatmulEngine", &setGroupedMatmulEngine),
      row("setAttentionEngine", &setAttentionEngine),
      row("allowNondeterministic", &allowNondeterministic),
      row("supports", &supports),
      row("empty", &empty),
      row("view", &view),
      row("free", &freeTensor),
      row("tensorInfo", &tensorInfo),
      row("version", &version),
      row("sharers", &sharers),
      row("liveSlots", &liveSlots),
      row("upload", &upload),
      row("download", &download),
      row("copyBetween", &copyBetween),
  };
}

}  // namespace viaduct::binding
