// The slower half of argument unpacking: what an op's hot path does not need, and the errors.
#include "bind.h"

namespace viaduct::binding {

static int64_t whole(Call& call, double d) {
  if (std::nearbyint(d) != d || std::fabs(d) > 9007199254740992.0) call.wrong("a whole number below 2^53");
  return static_cast<int64_t>(d);
}

int64_t Call::integer(napi_value v) {
  double d;
  if (napi_get_value_double(raw, v, &d) == napi_ok) return whole(*this, d);
  int64_t n;
  uint64_t u;
  bool lossless = false;
  if (napi_get_value_bigint_int64(raw, v, &n, &lossless) == napi_ok && lossless) return n;
  if (napi_get_value_bigint_uint64(raw, v, &u, &lossless) == napi_ok && lossless) return static_cast<int64_t>(u);
  wrong("a whole number or a bigint of 64 bits");
}

void Call::wrong(const char* expected) {
  throw Error("ERR_USAGE", name, "argument " + std::to_string(next) + ": expected " + expected);
}

void Call::elsewhere(const Slot& slot) const {
  throw Error("ERR_UNSUPPORTED", name,
              std::string("expected tensors of the stream's device, ") + stream->backend->name() + ", got " +
                  describe(slot.tensor) + " in memory of " + slot.storage->backend().name() +
                  (slot.storage->backend().name() == std::string(stream->backend->name()) ? " beside it" : "") +
                  ": copyBetween carries it over");
}

void Call::tooFew() { throw Error("ERR_USAGE", name, "expected more arguments, got " + std::to_string(argc)); }

std::vector<napi_value> Call::array(napi_value v, const char* expected) {
  bool isArray = false;
  uint32_t n = 0;
  if (napi_is_array(raw, v, &isArray) != napi_ok || !isArray) wrong(expected);
  napi_get_array_length(raw, v, &n);
  std::vector<napi_value> items(n);
  for (uint32_t i = 0; i < n; ++i) napi_get_element(raw, v, i, &items[i]);
  return items;
}

static void checkDims(Call& call, size_t n) {
  if (n <= static_cast<size_t>(kMaxDims)) return;
  throw Error("ERR_SHAPE", call.name, "expected at most 6 dimensions, got " + std::to_string(n));
}

/// A Float64Array is read from its memory: an element of a plain array costs as much as a whole argument.
Dims Arg<Dims>::get(Call& call) {
  napi_value list = call.take();
  Dims dims;
  napi_typedarray_type type;
  size_t count = 0;
  void* data = nullptr;
  if (napi_get_typedarray_info(call.raw, list, &type, &count, &data, nullptr, nullptr) == napi_ok) {
    if (type != napi_float64_array) call.wrong("an array of whole numbers");
    checkDims(call, count);
    dims.n = static_cast<int>(count);
    for (size_t i = 0; i < count; ++i) dims.v[i] = whole(call, static_cast<const double*>(data)[i]);
    return dims;
  }
  uint32_t n = 0;
  if (napi_get_array_length(call.raw, list, &n) != napi_ok) call.wrong("an array of whole numbers");
  checkDims(call, n);
  dims.n = static_cast<int>(n);
  for (uint32_t i = 0; i < n; ++i) {
    napi_value item = nullptr;
    napi_get_element(call.raw, list, i, &item);
    dims.v[i] = call.integer(item);
  }
  return dims;
}

std::vector<int64_t> Arg<std::vector<int64_t>>::get(Call& call) {
  std::vector<int64_t> numbers;
  for (napi_value v : call.array(call.take(), "an array of whole numbers")) numbers.push_back(call.integer(v));
  return numbers;
}

static std::string stringOf(Call& call, napi_value v) {
  size_t n = 0;
  if (napi_get_value_string_utf8(call.raw, v, nullptr, 0, &n) != napi_ok) call.wrong("a string");
  std::string s(n, '\0');
  napi_get_value_string_utf8(call.raw, v, s.data(), n + 1, &n);
  return s;
}

std::string Arg<std::string>::get(Call& call) { return stringOf(call, call.take()); }

std::vector<std::string> Arg<std::vector<std::string>>::get(Call& call) {
  std::vector<std::string> strings;
  for (napi_value v : call.array(call.take(), "an array of strings")) strings.push_back(stringOf(call, v));
  return strings;
}

BytesIn Arg<BytesIn>::get(Call& call) {
  napi_value v = call.take();
  BytesIn bytes;
  void* data = nullptr;
  bool is = false;
  if (napi_is_arraybuffer(call.raw, v, &is) == napi_ok && is) {
    napi_get_arraybuffer_info(call.raw, v, &data, &bytes.size);
  } else if (napi_is_typedarray(call.raw, v, &is) == napi_ok && is) {
    napi_typedarray_type type;
    size_t length = 0, offset = 0;
    napi_get_typedarray_info(call.raw, v, &type, &length, &data, nullptr, &offset);
    // clang-format off
    constexpr size_t widths[] = {1, 1, 1, 2, 2, 4, 4, 4, 8, 8, 8};
    // clang-format on
    bytes.size = length * widths[type];
  } else if (napi_is_dataview(call.raw, v, &is) == napi_ok && is) {
    napi_get_dataview_info(call.raw, v, &bytes.size, &data, nullptr, nullptr);
  } else {
    call.wrong("an ArrayBuffer or a view of one");
  }
  bytes.data = static_cast<const uint8_t*>(data);
  return bytes;
}

static void pin(Call& call, bool write, Pinned* pinned) {
  const Slot& slot = call.slot(call.take(), write);
  static_cast<TensorRef&>(*pinned) = slot.tensor;
  pinned->pin = slot.storage;
}

Pinned Arg<Pinned>::get(Call& call) {
  Pinned pinned;
  pin(call, false, &pinned);
  return pinned;
}

PinnedOut Arg<PinnedOut>::get(Call& call) {
  PinnedOut pinned;
  pin(call, true, &pinned);
  return pinned;
}

}  // namespace viaduct::binding
