// Rows of elements copied or cast from one dtype to another; no tensors, no threads. cast.cc has the conversions,
// copy.cc walks shapes with them.
#pragma once

#include <cstdint>

#include "../convert.h"
#include "../tensor.h"

namespace viaduct::cpu {

/// y[i * yStride] = x[i * xStride] for i in [0, n); strides in elements.
using CastRow = void (*)(void* y, int64_t yStride, const void* x, int64_t xStride, int64_t n);

/// The conversion of one row, or null where there is none (float to int or back). Equal dtypes copy bytes.
CastRow castRow(DType to, DType from);

}  // namespace viaduct::cpu
