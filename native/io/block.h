// Boxes of tensors that lie row-major in files: read into strided memory, written from it, copied between files; casts are
// fused. Scratch memory is bounded for the whole process. Nothing here knows formats: the caller gives offset, dtype, shape.
#pragma once

#include <cstdint>

#include "../tensor.h"
#include "file.h"

namespace viaduct::io {

/// A tensor inside of a file: row-major, from byte `offset` on.
struct FileTensor {
  int64_t offset = 0;
  DType dtype = DType::F32;
  Dims shape;
};

/// The box of `size` at `start` of a tensor in memory. Throws ERR_SHAPE where it is not inside.
TensorRef boxOf(const TensorRef& tensor, const Dims& start, const Dims& size, const char* where);

/// y[...] = the box of `size` y.shape at `start` of the file's tensor. Float casts to float, int to int (as Backend::copy).
void readBlock(const File& file, const FileTensor& x, const Dims& start, const TensorRef& y);
/// As readBlock, from a row-major tensor of this dtype and shape that was read before.
void placeBlock(const char* bytes, DType dtype, const Dims& shape, const Dims& start, const TensorRef& y);
/// The box of size x.shape at `start` of the file's tensor = x[...].
void writeBlock(const File& file, const FileTensor& y, const Dims& start, const TensorRef& x);
/// Box to box, through scratch memory.
void copyBlock(const File& from, const FileTensor& x, const Dims& xStart, const File& to, const FileTensor& y,
               const Dims& yStart, const Dims& size);

}  // namespace viaduct::io
