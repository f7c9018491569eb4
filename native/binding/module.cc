// The addon's entry: every row becomes a function, for each JavaScript environment that loads it. `table()` lists them, so
// that a test can compare them with lib/addon/functions.ts; `setErrorFactory(fn)` takes what makes JavaScript errors.
#include "bind.h"

namespace viaduct::binding {

namespace {

Value table(Env&);
void setErrorFactory(Env& env, napi_value factory) { env.setErrorFactory(factory); }

/// Made once a process and never moved: callbacks point into it.
const std::vector<Row>& rows() {
  static const auto* all = [] {
    auto* list = new std::vector<Row>();
    auto append = [list](std::vector<Row> more) { list->insert(list->end(), more.begin(), more.end()); };
    append({row("table", &table), row("setErrorFactory", &setErrorFactory)});
    append(memoryRows());
    append(streamRows());
    append(opRows());
    append(ioRows());
    append(commRows());
    return list;
  }();
  return *all;
}

Value table(Env&) {
  std::vector<Value> list;
  for (const Row& r : rows()) {
    list.push_back(Value::Record{{"name", r.name}, {"args", std::vector<std::string>(r.args.begin(), r.args.end())}});
  }
  return list;
}

napi_value init(napi_env env, napi_value exports) {
  new Env(env);  // deletes itself when the environment ends
  for (const Row& r : rows()) {
    napi_value fn = nullptr;
    napi_create_function(env, r.name, NAPI_AUTO_LENGTH, r.call, const_cast<Row*>(&r), &fn);
    napi_set_named_property(env, exports, r.name, fn);
  }
  return exports;
}

}  // namespace

}  // namespace viaduct::binding

NAPI_MODULE_INIT() { return viaduct::binding::init(env, exports); }
