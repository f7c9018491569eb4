// Elementwise reduction of equal blocks that came from several ranks. The order of the sources is the order of the sum.
#pragma once

#include <cstdint>

#include "../comm.h"

namespace viaduct::cpu {

/// Whether `reduceSources` takes this dtype.
bool reducible(DType dtype);

/// out[i] = sources[0][i] op sources[1][i] op ... for `count` elements; BF16 and F16 are accumulated in F32 and rounded
/// once. `out` may be one of the sources. Max and Min give NaN where a source has NaN. BOOL: Sum and Max are "or", Min "and".
void reduceSources(void* out, const void* const* sources, int n, int64_t count, DType dtype, ReduceOp op);

}  // namespace viaduct::cpu
