// Token ids and labels, I32 or I64, read as I64.
#pragma once

#include <cstdint>

#include "../tensor.h"

namespace viaduct::cpu {

class Ids {
 public:
  explicit Ids(const TensorRef& t) : data_(t.data), wide_(t.dtype == DType::I64) {}
  int64_t operator[](int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(data_)[i] : static_cast<const int32_t*>(data_)[i];
  }

 private:
  const void* data_;
  bool wide_;
};

}  // namespace viaduct::cpu
