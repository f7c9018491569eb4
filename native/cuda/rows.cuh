// Rows of a tensor for kernels: all dims but the last, counted in row-major order, each row contiguous.
#pragma once

#include "../tensor.h"
#include "launch.cuh"

namespace viaduct::cuda {

/// Where each row of a tensor begins. Neighbouring dims that lie like one are one.
class RowPlaces {
 public:
  /// @param from, to - the dims that count as rows, [from, to).
  RowPlaces(const TensorRef& x, int from, int to) {
    for (int d = from; d < to; ++d) {
      if (x.shape[d] == 1) continue;
      if (dims_ > 0 && stride_[dims_ - 1] == x.shape[d] * x.stride[d]) {
        size_[dims_ - 1] *= x.shape[d];
        stride_[dims_ - 1] = x.stride[d];
      } else {
        size_[dims_] = x.shape[d];
        stride_[dims_++] = x.stride[d];
      }
    }
  }
  explicit RowPlaces(const TensorRef& x) : RowPlaces(x, 0, x.ndim > 0 ? x.ndim - 1 : 0) {}

  int64_t count() const {
    int64_t n = 1;
    for (int d = 0; d < dims_; ++d) n *= size_[d];
    return n;
  }
  /// Whether every row begins at a multiple of so many elements from the first one.
  bool multiplesOf(int64_t elements) const {
    for (int d = 0; d < dims_; ++d) {
      if (stride_[d] % elements != 0) return false;
    }
    return true;
  }
  /// Elements from the first row to this one.
  __device__ int64_t operator[](int64_t row) const {
    int64_t at = 0;
    for (int d = dims_ - 1; d > 0; --d) {
      const int64_t rest = row / size_[d];
      at += (row - rest * size_[d]) * stride_[d];
      row = rest;
    }
    return dims_ > 0 ? at + row * stride_[0] : 0;
  }

 private:
  int dims_ = 0;
  int64_t size_[kMaxDims] = {};
  int64_t stride_[kMaxDims] = {};
};

/// The rows of an operand of type T; absent where the tensor is.
template <typename T>
struct RowsOf {
  T* data;
  RowPlaces places;
  explicit RowsOf(const TensorRef& x) : data(x.present() ? x.as<T>() : nullptr), places(x) {}
  __device__ T* operator[](int64_t row) const { return data + places[row]; }
  /// Whether packs of W elements of the width may be read in each row.
  bool packs(int W) const { return reinterpret_cast<uintptr_t>(data) % 16 == 0 && places.multiplesOf(W); }
};

}  // namespace viaduct::cuda
