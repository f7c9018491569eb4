// Token ids and labels, I32 or I64, read as I64 by the CPU and by kernels.
#pragma once

#include <cstdint>

#include "half.h"
#include "tensor.h"

namespace viaduct {

/// The label of a token without a loss.
constexpr int64_t kIgnoredLabel = -100;

class Ids {
 public:
  explicit Ids(const TensorRef& t) : data_(t.data), wide_(t.dtype == DType::I64) {}
  VIADUCT_HOST_DEVICE int64_t operator[](int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(data_)[i] : static_cast<const int32_t*>(data_)[i];
  }

 private:
  const void* data_;
  bool wide_;
};

}  // namespace viaduct
