// How a C++ function becomes a JavaScript function: one row each. HOW TO ADD ROWS (io.cc, comm.cc):
//
//   static Promise readBlock(Env& env, const std::string& path, Pinned y, int64_t offset) {   // Env& first is optional
//     return async(env, [path, y = std::move(y), offset] { ...blocking work...; return Value(bytesRead); });
//   }
//   std::vector<Row> ioRows() { return {row("readBlock", &readBlock), row("hashFile", &hashFile)}; }
//
// module.cc collects opRows, memoryRows, streamRows, ioRows, commRows. Arguments by type, checked (ERR_HANDLE, ERR_USAGE):
//   In Out InOut (handle)  OptIn OptOut OptInOut (handle or 0)  std::vector<In> / <Out> / <InOut> (array of handles)
//   Pinned, PinnedOut (handle; keeps the memory alive until the copy is dropped, on any thread: for work off the streams)
//   Stream& (stream id)  Backend& (device index)  double  int64_t / int (whole number, or bigint)  bool  std::string
//   DType, Activation, ReduceOp (code)  Dims  std::vector<int64_t>  std::vector<std::string>
//   BytesIn (ArrayBuffer or view, valid until the call returns: copy it)  napi_value (anything)
// Every Out, InOut and PinnedOut bumps its version and every tensor is noted as used on the row's Stream&, after the function returned.
// Results: void, bool, double, int64_t, std::string, Value (see env.h), Promise, napi_value.
// Throw viaduct::Error for failures. A promise settled by other means: `Deferred d = env.defer()`, return Promise{d.promise()}
// and later d.resolve(value) or d.reject(error) from any thread, e.g. in stream.notify. State of a row file: env.part<T>().
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "../comm.h"
#include "env.h"

namespace viaduct::binding {

struct Row {
  const char* name;
  std::vector<const char*> args;  // kinds, for addon.table()
  napi_callback call;
  alignas(16) std::array<char, 16> target;  // the function pointer or pointer to member, by its bytes
};

constexpr size_t kMaxArgs = 24;

/// A tensor whose memory stays alive while this (or a copy) does.
struct Pinned : TensorRef {
  std::shared_ptr<Storage> pin;
};

struct PinnedOut : Pinned {};

struct BytesIn {
  const uint8_t* data = nullptr;
  size_t size = 0;
};

/// One call in progress: its arguments and the tensors that it touches.
struct Call {
  Call(Env& env, napi_env raw) : env(env), raw(raw) {}
  Env& env;
  napi_env raw;
  const char* name = nullptr;
  size_t argc = 0;
  size_t next = 0;
  napi_value argv[kMaxArgs];
  StreamEntry* stream = nullptr;
  struct Use {
    Storage* storage;
    bool write;
  };
  size_t uses = 0;
  Use use[kMaxArgs];
  std::vector<Use> moreUses;

  napi_value take() {
    if (next >= argc) tooFew();
    return argv[next++];
  }
  double number(napi_value v) {
    double d;
    if (napi_get_value_double(raw, v, &d) != napi_ok) wrong("a number");
    return d;
  }
  int64_t integer(napi_value v);
  /// The tensor of a handle, noted as used.
  const Slot& slot(napi_value v, bool write, bool many = false) {
    const double d = number(v);
    Slot& slot = env.slots.at(static_cast<int64_t>(d), name);
    const Use u{slot.storage.get(), write};
    if (many) {
      moreUses.push_back(u);
    } else {
      use[uses++] = u;
    }
    return slot;
  }
  /// Throws ERR_UNSUPPORTED when the tensor lies in another device's memory than the call's stream works on.
  const Slot& local(const Slot& slot) const {
    if (stream != nullptr && &slot.storage->backend() != stream->backend) elsewhere(slot);
    return slot;
  }
  [[noreturn]] void elsewhere(const Slot& slot) const;
  /// After the function returned: versions and last uses.
  void finish() {
    for (size_t i = 0; i < uses; ++i) finish(use[i]);
    for (const Use& u : moreUses) finish(u);
  }
  void finish(const Use& u) {
    if (u.write) u.storage->version += 1;
    if (stream != nullptr) u.storage->noteUse(stream->stream);
  }
  /// Argument number `next` is not what was expected: throws ERR_USAGE.
  [[noreturn]] void wrong(const char* expected);
  [[noreturn]] void tooFew();
  std::vector<napi_value> array(napi_value v, const char* expected);
};

template <typename T>
struct Arg;

template <typename T, bool Write, bool Optional>
struct TensorArg {
  static T get(Call& call) {
    napi_value v = call.take();
    T tensor;
    if (Optional && call.number(v) == 0) return tensor;
    static_cast<TensorRef&>(tensor) = call.local(call.slot(v, Write)).tensor;
    return tensor;
  }
};
template <typename T, bool Write>
struct TensorsArg {
  static std::vector<T> get(Call& call) {
    std::vector<T> tensors;
    for (napi_value v : call.array(call.take(), "an array of tensors")) {
      T tensor;
      static_cast<TensorRef&>(tensor) = call.local(call.slot(v, Write, true)).tensor;
      tensors.push_back(tensor);
    }
    return tensors;
  }
};
template <typename T>
struct EnumArg {
  static T make(Call& call, int64_t last, const char* expected) {
    const int64_t code = call.integer(call.take());
    if (code < 0 || code > last) call.wrong(expected);
    return static_cast<T>(code);
  }
};

// clang-format off
template <> struct Arg<In> : TensorArg<In, false, false> { static constexpr const char* kind = "In"; };
template <> struct Arg<Out> : TensorArg<Out, true, false> { static constexpr const char* kind = "Out"; };
template <> struct Arg<InOut> : TensorArg<InOut, true, false> { static constexpr const char* kind = "InOut"; };
template <> struct Arg<OptIn> : TensorArg<OptIn, false, true> { static constexpr const char* kind = "OptIn"; };
template <> struct Arg<OptOut> : TensorArg<OptOut, true, true> { static constexpr const char* kind = "OptOut"; };
template <> struct Arg<OptInOut> : TensorArg<OptInOut, true, true> { static constexpr const char* kind = "OptInOut"; };
template <> struct Arg<std::vector<In>> : TensorsArg<In, false> { static constexpr const char* kind = "In[]"; };
template <> struct Arg<std::vector<Out>> : TensorsArg<Out, true> { static constexpr const char* kind = "Out[]"; };
template <> struct Arg<std::vector<InOut>> : TensorsArg<InOut, true> { static constexpr const char* kind = "InOut[]"; };
template <> struct Arg<Pinned> { static constexpr const char* kind = "Pinned"; static Pinned get(Call& call); };
template <> struct Arg<PinnedOut> { static constexpr const char* kind = "PinnedOut"; static PinnedOut get(Call& call); };
template <> struct Arg<Stream&> { static constexpr const char* kind = "Stream"; static Stream& get(Call& call) {
    call.stream = &call.env.stream(call.integer(call.take()));
    return *call.stream->stream;
} };
template <> struct Arg<Backend&> { static constexpr const char* kind = "Device"; static Backend& get(Call& call) {
    return call.env.device(call.integer(call.take()));
} };
template <> struct Arg<double> { static constexpr const char* kind = "number"; static double get(Call& call) { return call.number(call.take()); } };
template <> struct Arg<int64_t> { static constexpr const char* kind = "integer"; static int64_t get(Call& call) { return call.integer(call.take()); } };
template <> struct Arg<int> { static constexpr const char* kind = "integer"; static int get(Call& call) {
    const int64_t n = call.integer(call.take());
    if (n < INT32_MIN || n > INT32_MAX) call.wrong("a whole number of 32 bits");
    return static_cast<int>(n);
} };
template <> struct Arg<bool> { static constexpr const char* kind = "boolean"; static bool get(Call& call) {
    bool b;
    if (napi_get_value_bool(call.raw, call.take(), &b) != napi_ok) call.wrong("a boolean");
    return b;
} };
template <> struct Arg<DType> : EnumArg<DType> { static constexpr const char* kind = "DType"; static DType get(Call& call) { return make(call, 14, "the code of a dtype"); } };
template <> struct Arg<Activation> : EnumArg<Activation> { static constexpr const char* kind = "Activation"; static Activation get(Call& call) { return make(call, 6, "the code of an activation"); } };
template <> struct Arg<ReduceOp> : EnumArg<ReduceOp> { static constexpr const char* kind = "ReduceOp"; static ReduceOp get(Call& call) { return make(call, 2, "the code of a reduction"); } };
template <> struct Arg<std::string> { static constexpr const char* kind = "string"; static std::string get(Call& call); };
template <> struct Arg<Dims> { static constexpr const char* kind = "Dims"; static Dims get(Call& call); };
template <> struct Arg<std::vector<int64_t>> { static constexpr const char* kind = "integer[]"; static std::vector<int64_t> get(Call& call); };
template <> struct Arg<std::vector<std::string>> { static constexpr const char* kind = "string[]"; static std::vector<std::string> get(Call& call); };
template <> struct Arg<BytesIn> { static constexpr const char* kind = "bytes"; static BytesIn get(Call& call); };
template <> struct Arg<napi_value> { static constexpr const char* kind = "unknown"; static napi_value get(Call& call) { return call.take(); } };
template <> struct Arg<Env&> { static constexpr const char* kind = nullptr; static Env& get(Call& call) { return call.env; } };
// clang-format on

/// `const T&` is unpacked as T.
template <typename A>
using ArgOf = Arg<std::conditional_t<std::is_reference_v<A> && std::is_const_v<std::remove_reference_t<A>>,
                                     std::remove_cv_t<std::remove_reference_t<A>>, A>>;

inline napi_value toJs(napi_env env, double v) {
  napi_value out = nullptr;
  napi_create_double(env, v, &out);
  return out;
}
inline napi_value toJs(napi_env env, int64_t v) { return toJs(env, static_cast<double>(v)); }
inline napi_value toJs(napi_env env, bool v) {
  napi_value out = nullptr;
  napi_get_boolean(env, v, &out);
  return out;
}
inline napi_value toJs(napi_env env, const std::string& v) { return Value(v).toJs(env); }
inline napi_value toJs(napi_env env, const Value& v) { return v.toJs(env); }
inline napi_value toJs(napi_env, const Promise& v) { return v.value; }
inline napi_value toJs(napi_env, napi_value v) { return v; }

/// Unpacks, calls, packs; a native exception becomes a pending JavaScript exception.
template <typename F>
napi_value guarded(napi_env raw, napi_callback_info info, F&& body) {
  void* data = nullptr;
  Env& env = Env::of(raw);
  Call call(env, raw);
  call.argc = kMaxArgs;
  napi_get_cb_info(raw, info, &call.argc, call.argv, nullptr, &data);
  const Row& row = *static_cast<const Row*>(data);
  call.name = row.name;
  try {
    return body(call, row);
  } catch (...) {
    napi_value error = env.toJsError(std::current_exception());
    if (error != nullptr) napi_throw(raw, error);
    return nullptr;
  }
}

template <typename R, typename... A>
napi_value callFree(napi_env raw, napi_callback_info info) {
  return guarded(raw, info, [](Call& call, const Row& row) -> napi_value {
    R (*fn)(A...);
    std::memcpy(&fn, row.target.data(), sizeof fn);
    std::tuple<decltype(ArgOf<A>::get(call))...> args{ArgOf<A>::get(call)...};  // braces: from left to right
    if constexpr (std::is_void_v<R>) {
      std::apply(fn, std::move(args));
      call.finish();
      return nullptr;
    } else {
      R result = std::apply(fn, std::move(args));
      call.finish();
      return toJs(call.raw, result);
    }
  });
}

template <typename... A>
napi_value callOp(napi_env raw, napi_callback_info info) {
  return guarded(raw, info, [](Call& call, const Row& row) -> napi_value {
    void (Backend::*method)(Stream&, A...);
    std::memcpy(&method, row.target.data(), sizeof method);
    Stream& stream = Arg<Stream&>::get(call);
    std::tuple<decltype(ArgOf<A>::get(call))...> args{ArgOf<A>::get(call)...};
    Backend& backend = *call.stream->backend;
    std::apply([&](auto&&... a) { (backend.*method)(stream, std::forward<decltype(a)>(a)...); }, std::move(args));
    call.finish();
    return nullptr;
  });
}

template <typename F>
Row makeRow(const char* name, napi_callback call, F target, std::initializer_list<const char*> kinds) {
  Row row{name, {}, call, {}};
  static_assert(sizeof target <= sizeof row.target);
  std::memcpy(row.target.data(), &target, sizeof target);
  for (const char* kind : kinds) {
    if (kind != nullptr) row.args.push_back(kind);
  }
  return row;
}

/// A free function.
template <typename R, typename... A>
Row row(const char* name, R (*fn)(A...)) {
  return makeRow(name, &callFree<R, A...>, fn, {ArgOf<A>::kind...});
}
/// An op: a method of Backend, with the stream id first.
template <typename... A>
Row row(const char* name, void (Backend::*method)(Stream&, A...)) {
  return makeRow(name, &callOp<A...>, method, {"Stream", ArgOf<A>::kind...});
}

/// A promise of what `work` returns (void or anything that makes a Value). It runs on a pool thread and may block and throw.
template <typename F>
Promise async(Env& env, F work) {
  Deferred deferred = env.defer();
  auto shared = std::make_shared<F>(std::move(work));
  env.runBlocking([deferred, shared]() mutable {
    try {
      if constexpr (std::is_void_v<decltype((*shared)())>) {
        (*shared)();
        shared.reset();  // pins go before the promise settles
        deferred.resolve(Value());
      } else {
        Value value((*shared)());
        shared.reset();
        deferred.resolve(std::move(value));
      }
    } catch (...) {
      shared.reset();
      deferred.reject(std::current_exception());
    }
  });
  return Promise{deferred.promise()};
}

std::vector<Row> opRows();
std::vector<Row> memoryRows();
std::vector<Row> streamRows();
std::vector<Row> ioRows();
std::vector<Row> commRows();

}  // namespace viaduct::binding
