// How one element becomes an element of another dtype, the same on every device: floats through F32, whole numbers by
// truncation, truth values as "not zero". Storage types of floats stand in half.h.
#pragma once

#include <cstdint>

#include "half.h"
#include "tensor.h"

namespace viaduct {

// Truth values are one byte of their own type, so that narrowing to them means "not zero".
struct Bool {
  uint8_t bits;
};

template <typename To, typename From>
struct Cast {  // between floats, through F32 (exact for all but F64, which PyTorch rounds to F32 first as well)
  VIADUCT_HOST_DEVICE static To one(From x) { return fromFloat<To>(toFloat(x)); }
};
template <typename To, typename From>
struct IntCast {
  VIADUCT_HOST_DEVICE static To one(From x) { return static_cast<To>(x); }
};
template <typename From>
struct IntCast<Bool, From> {
  VIADUCT_HOST_DEVICE static Bool one(From x) { return Bool{static_cast<uint8_t>(x != 0)}; }
};
template <typename To>
struct IntCast<To, Bool> {
  VIADUCT_HOST_DEVICE static To one(Bool x) { return static_cast<To>(x.bits != 0); }
};
template <>
struct IntCast<Bool, Bool> {
  VIADUCT_HOST_DEVICE static Bool one(Bool x) { return x; }
};

/// Whether tensors of these dtypes can be copied into each other: both floats, or both whole numbers and truth values.
bool convertible(DType to, DType from);

/// value as one element of dtype, in the first dtypeBytes(dtype) bytes of the result.
struct Element {
  unsigned char bytes[8] = {};
};
Element elementOf(DType dtype, double value);

}  // namespace viaduct
