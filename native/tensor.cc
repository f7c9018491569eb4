// Names and sizes of dtypes, and how a tensor prints in a message.
#include "tensor.h"

namespace viaduct {

size_t dtypeBytes(DType dtype) {
  switch (dtype) {
    case DType::F64:
    case DType::I64:
    case DType::U64:
      return 8;
    case DType::F32:
    case DType::I32:
    case DType::U32:
      return 4;
    case DType::BF16:
    case DType::F16:
    case DType::I16:
    case DType::U16:
      return 2;
    case DType::I8:
    case DType::U8:
    case DType::BOOL:
    case DType::F8_E4M3:
    case DType::F8_E5M2:
      return 1;
  }
  return 0;
}

const char* dtypeName(DType dtype) {
  switch (dtype) {
    case DType::F32:
      return "float32";
    case DType::BF16:
      return "bfloat16";
    case DType::F16:
      return "float16";
    case DType::F64:
      return "float64";
    case DType::I64:
      return "int64";
    case DType::I32:
      return "int32";
    case DType::I16:
      return "int16";
    case DType::I8:
      return "int8";
    case DType::U8:
      return "uint8";
    case DType::BOOL:
      return "bool";
    case DType::F8_E4M3:
      return "float8_e4m3fn";
    case DType::F8_E5M2:
      return "float8_e5m2";
    case DType::U16:
      return "uint16";
    case DType::U32:
      return "uint32";
    case DType::U64:
      return "uint64";
  }
  return "unknown";
}

namespace {

std::string list(const int64_t* values, int n) {
  std::string text = "[";
  for (int i = 0; i < n; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

}  // namespace

std::string describe(const TensorRef& t) {
  if (!t.present()) return "nothing";
  std::string text = std::string(dtypeName(t.dtype)) + " " + list(t.shape, t.ndim);
  if (!t.contiguous()) text += " strides " + list(t.stride, t.ndim);
  return text;
}

}  // namespace viaduct
