// A tensor seen as rows: every dim but the last counts rows, the last is contiguous. Strides in elements.
#pragma once

#include <cstdint>

#include "../tensor.h"

namespace viaduct::cpu {

template <typename T>
class Rows {
 public:
  explicit Rows(const TensorRef& x) : data_(x.as<T>()) {
    int64_t count = 1;
    for (int i = 0; i + 1 < x.ndim; ++i) {
      if (x.shape[i] == 1) continue;
      if (ndim_ > 0 && stride_[ndim_ - 1] == x.stride[i] * x.shape[i]) {
        shape_[ndim_ - 1] *= x.shape[i];
        stride_[ndim_ - 1] = x.stride[i];
      } else {
        shape_[ndim_] = x.shape[i];
        stride_[ndim_] = x.stride[i];
        ++ndim_;
      }
      count *= x.shape[i];
    }
    count_ = count;
    width_ = x.ndim > 0 ? x.shape[x.ndim - 1] : 1;
  }

  int64_t count() const { return count_; }
  int64_t width() const { return width_; }
  T* operator[](int64_t row) const {
    if (ndim_ <= 1) return data_ + (ndim_ == 1 ? row * stride_[0] : 0);
    int64_t offset = 0;
    for (int i = ndim_ - 1; i >= 0; --i) {
      offset += row % shape_[i] * stride_[i];
      row /= shape_[i];
    }
    return data_ + offset;
  }

 private:
  T* data_;
  int ndim_ = 0;
  int64_t count_ = 0;
  int64_t width_ = 0;
  int64_t shape_[kMaxDims] = {};
  int64_t stride_[kMaxDims] = {};
};

}  // namespace viaduct::cpu
