// The one exception type of native code. Native code throws and never exits; the binding turns this into a coded JS error.
#pragma once

#include <stdexcept>
#include <string>

namespace viaduct {

/// `code` is one of lib/base/errors.ts, e.g. "ERR_SHAPE"; `where` is the op or the part, e.g. "rmsNormForward".
class Error : public std::runtime_error {
 public:
  Error(std::string code, std::string where, const std::string& message)
      : std::runtime_error("[" + where + "] " + message), code(std::move(code)), where(std::move(where)) {}
  std::string code;
  std::string where;
};

/// Throws Error{code, where, message} unless ok. `message` is only built when it is needed.
#define VIADUCT_CHECK(ok, code, where, message)                    \
  do {                                                             \
    if (!(ok)) throw ::viaduct::Error((code), (where), (message)); \
  } while (0)

}  // namespace viaduct
