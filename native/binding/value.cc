// Native results as JavaScript values. Each conversion is a closure that runs on the JavaScript thread.
#include <cstring>

#include "env.h"

namespace viaduct::binding {

namespace {

template <typename T>
Value::Make list(std::vector<T> items) {
  return [items = std::move(items)](napi_env env) {
    napi_value out = nullptr;
    napi_create_array_with_length(env, items.size(), &out);
    for (size_t i = 0; i < items.size(); ++i) {
      napi_set_element(env, out, static_cast<uint32_t>(i), Value(items[i]).toJs(env));
    }
    return out;
  };
}

}  // namespace

Value::Value(bool v)
    : make_([v](napi_env env) {
        napi_value out = nullptr;
        napi_get_boolean(env, v, &out);
        return out;
      }) {}

Value::Value(double v)
    : make_([v](napi_env env) {
        napi_value out = nullptr;
        napi_create_double(env, v, &out);
        return out;
      }) {}

Value::Value(std::string v)
    : make_([v = std::move(v)](napi_env env) {
        napi_value out = nullptr;
        napi_create_string_utf8(env, v.data(), v.size(), &out);
        return out;
      }) {}

Value::Value(std::vector<uint8_t> v)
    : make_([v = std::move(v)](napi_env env) {
        void* data = nullptr;
        napi_value buffer = nullptr, out = nullptr;
        napi_create_arraybuffer(env, v.size(), &data, &buffer);
        if (!v.empty()) std::memcpy(data, v.data(), v.size());
        napi_create_typedarray(env, napi_uint8_array, v.size(), buffer, 0, &out);
        return out;
      }) {}

Value::Value(std::vector<int64_t> v) : make_(list(std::move(v))) {}
Value::Value(std::vector<std::string> v) : make_(list(std::move(v))) {}
Value::Value(std::vector<Value> v) : make_(list(std::move(v))) {}

Value::Value(Record v)
    : make_([v = std::move(v)](napi_env env) {
        napi_value out = nullptr;
        napi_create_object(env, &out);
        for (const auto& [key, value] : v) napi_set_named_property(env, out, key.c_str(), value.toJs(env));
        return out;
      }) {}

napi_value Value::toJs(napi_env env) const {
  if (make_) return make_(env);
  napi_value out = nullptr;
  napi_get_undefined(env, &out);
  return out;
}

}  // namespace viaduct::binding
