// What a tensor is to a backend: raw memory plus dtype, shape and strides, by value. The slot table that owns the memory
// is in slots.h; nothing here knows handles, JavaScript or ranks. Strides and shapes are in elements.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace viaduct {

// Codes cross the addon boundary and stand in lib/base/dtype.ts too; a house test compares both.
enum class DType : uint8_t {
  F32 = 0,
  BF16 = 1,
  F16 = 2,
  F64 = 3,
  I64 = 4,
  I32 = 5,
  I16 = 6,
  I8 = 7,
  U8 = 8,
  BOOL = 9,
  F8_E4M3 = 10,
  F8_E5M2 = 11,
  U16 = 12,
  U32 = 13,
  U64 = 14,
};

/// Bytes of one element.
size_t dtypeBytes(DType dtype);
/// PyTorch's name without the prefix, e.g. "bfloat16".
const char* dtypeName(DType dtype);

constexpr int kMaxDims = 6;

/// A strided view of device memory. Copied into commands by value: the storage outlives the command (see docs/runtime.md).
struct TensorRef {
  void* data = nullptr;
  DType dtype = DType::F32;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};

  bool present() const { return data != nullptr || (ndim > 0 && numel() == 0); }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  int64_t dim(int i) const { return shape[i < 0 ? ndim + i : i]; }
  /// Row-major without gaps.
  bool contiguous() const {
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && stride[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
  /// Only the innermost dimension must be without gaps.
  bool rowStrided() const { return ndim == 0 || shape[ndim - 1] == 1 || stride[ndim - 1] == 1; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Argument roles of an op. The binding unpacks a handle into the type that the op's signature names: Out and InOut bump
// the tensor's version, Opt* accept handle 0 for "absent" (present() is false).
struct In : TensorRef {};
struct Out : TensorRef {};
struct InOut : TensorRef {};
struct OptIn : TensorRef {};
struct OptOut : TensorRef {};
struct OptInOut : TensorRef {};

/// The same tensor in another role.
template <typename Role>
Role as(const TensorRef& x) {
  Role same;
  static_cast<TensorRef&>(same) = x;
  return same;
}

/// `count` rows of x from row `first` on.
template <typename Role>
Role rowsOf(const TensorRef& x, int64_t first, int64_t count) {
  Role part = as<Role>(x);
  part.data = x.as<char>() + first * x.stride[0] * static_cast<int64_t>(dtypeBytes(x.dtype));
  part.shape[0] = count;
  return part;
}

/// A short list of integers from JavaScript (shapes, starts, counts).
struct Dims {
  int n = 0;
  int64_t v[kMaxDims] = {};
};

/// "float32 [4, 8] strides [8, 1]", for messages.
std::string describe(const TensorRef& t);

}  // namespace viaduct
