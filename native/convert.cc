// One value as an element of any dtype; see convert.h.
#include "convert.h"

#include <cstring>

namespace viaduct {

namespace {

bool isFloat(DType dtype) {
  switch (dtype) {
    case DType::F32:
    case DType::BF16:
    case DType::F16:
    case DType::F64:
    case DType::F8_E4M3:
    case DType::F8_E5M2:
      return true;
    default:
      return false;
  }
}

template <typename T>
Element bytesOf(T value) {
  Element element;
  std::memcpy(element.bytes, &value, sizeof value);
  return element;
}

}  // namespace

bool convertible(DType to, DType from) { return isFloat(to) == isFloat(from); }

Element elementOf(DType dtype, double value) {
  const auto number = static_cast<float>(value);
  const auto whole = [&] { return static_cast<int64_t>(value); };
  switch (dtype) {
    case DType::F64:
      return bytesOf(value);
    case DType::F32:
      return bytesOf(number);
    case DType::BF16:
      return bytesOf(fromFloat<BF16>(number));
    case DType::F16:
      return bytesOf(fromFloat<F16>(number));
    case DType::F8_E4M3:
      return bytesOf(fromFloat<F8E4M3>(number));
    case DType::F8_E5M2:
      return bytesOf(fromFloat<F8E5M2>(number));
    case DType::BOOL:
      return bytesOf(static_cast<uint8_t>(value != 0));
    case DType::U64:
      return bytesOf(value >= 0x1p63 ? static_cast<uint64_t>(value) : static_cast<uint64_t>(whole()));
    case DType::I64:
      return bytesOf(whole());
    case DType::I32:
    case DType::U32:
      return bytesOf(static_cast<int32_t>(whole()));
    case DType::I16:
    case DType::U16:
      return bytesOf(static_cast<int16_t>(whole()));
    case DType::I8:
    case DType::U8:
      return bytesOf(static_cast<int8_t>(whole()));
  }
  return {};
}

}  // namespace viaduct
