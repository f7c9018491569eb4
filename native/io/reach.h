// Files meet tensors wherever they lie: on a device whose memory the host cannot touch, a box passes through host memory in
// pieces. On the CPU nothing is copied.
#pragma once

#include <functional>

#include "../backend.h"
#include "../tensor.h"

namespace viaduct::io {

/// Work on a piece of a box: the piece in host memory, and where it starts in the box.
using OnPiece = std::function<void(const TensorRef& piece, const Dims& start)>;

/// `fill` writes each piece, which then goes to the box.
void intoBox(Backend& backend, const TensorRef& box, const OnPiece& fill);
/// `use` reads each piece of the box.
void fromBox(Backend& backend, const TensorRef& box, const OnPiece& use);

/// a + b, for places in a tensor.
Dims shifted(const Dims& a, const Dims& b);

}  // namespace viaduct::io
