// Rows for files: boxes of tensors in and out, copies between files, hashes, comparisons, reserved files. All of them answer
// with a promise and run on the pool. Nothing orders them against streams: the caller waits for the tensor's stream first.
//
// A tensor in a file is (path, byte offset, dtype, shape), row-major. `yStart`/`xStart` choose the box inside of the tensor
// in memory, `start` the box inside of the file's tensor; both have the size `size`.
#include "../io/block.h"
#include "bind.h"

namespace viaduct::binding {
namespace {

/// The box of `size` at `start` of a tensor in memory.
TensorRef boxOf(const TensorRef& tensor, const Dims& start, const Dims& size, const char* where) {
  VIADUCT_CHECK(start.n == tensor.ndim && size.n == tensor.ndim, "ERR_SHAPE", where,
                "expected start and size of rank " + std::to_string(tensor.ndim) + " for " + describe(tensor));
  TensorRef box = tensor;
  int64_t offset = 0;
  for (int d = 0; d < tensor.ndim; ++d) {
    VIADUCT_CHECK(start.v[d] >= 0 && size.v[d] >= 0 && start.v[d] <= tensor.shape[d] - size.v[d], "ERR_SHAPE", where,
                  "expected a box inside of " + describe(tensor) + ", got " + std::to_string(start.v[d]) + " and " +
                      std::to_string(size.v[d]) + " elements in dim " + std::to_string(d));
    box.shape[d] = size.v[d];
    offset += start.v[d] * tensor.stride[d];
  }
  box.data = static_cast<char*>(tensor.data) + offset * static_cast<int64_t>(dtypeBytes(tensor.dtype));
  return box;
}

Promise readBlock(Env& env, const std::string& path, int64_t offset, DType dtype, const Dims& shape, const Dims& start,
                  const Dims& size, PinnedOut y, const Dims& yStart) {
  const TensorRef box = boxOf(y, yStart, size, "readBlock");
  return async(env, [=, y = std::move(y)] {
    io::readBlock(io::File::forReading(path), io::FileTensor{offset, dtype, shape}, start, box);
  });
}

Promise writeBlock(Env& env, const std::string& path, int64_t offset, DType dtype, const Dims& shape, const Dims& start,
                   const Dims& size, Pinned x, const Dims& xStart) {
  const TensorRef box = boxOf(x, xStart, size, "writeBlock");
  return async(env, [=, x = std::move(x)] {
    io::writeBlock(io::File::forWriting(path), io::FileTensor{offset, dtype, shape}, start, box);
  });
}

Promise copyBlock(Env& env, const std::string& from, int64_t xOffset, DType xDtype, const Dims& xShape,
                  const Dims& xStart, const std::string& to, int64_t yOffset, DType yDtype, const Dims& yShape,
                  const Dims& yStart, const Dims& size) {
  return async(env, [=] {
    io::copyBlock(io::File::forReading(from), io::FileTensor{xOffset, xDtype, xShape}, xStart, io::File::forWriting(to),
                  io::FileTensor{yOffset, yDtype, yShape}, yStart, size);
  });
}

Promise hashRange(Env& env, const std::string& path, int64_t offset, int64_t bytes) {
  return async(env, [=] { return io::hashRange(io::File::forReading(path), offset, bytes); });
}

/// { differing, first }: bytes that differ, and the offset of the first of them in the range, or -1.
Promise compareRanges(Env& env, const std::string& a, int64_t aOffset, const std::string& b, int64_t bOffset,
                      int64_t bytes) {
  return async(env, [=] {
    const io::Comparison c =
        io::compareRanges(io::File::forReading(a), aOffset, io::File::forReading(b), bOffset, bytes);
    return Value(Value::Record{{"differing", c.differing}, {"first", c.first}});
  });
}

/// A new file of `bytes` bytes whose space is reserved, beginning with `head`.
Promise createFile(Env& env, const std::string& path, int64_t bytes, BytesIn head) {
  return async(env, [path, bytes, head = std::vector<uint8_t>(head.data, head.data + head.size)] {
    const io::File file = io::File::create(path);
    file.reserve(bytes);
    file.writeAt(head.data(), head.size(), 0);
  });
}

bool exchangePaths(const std::string& a, const std::string& b) { return io::exchangePaths(a, b); }

}  // namespace

std::vector<Row> ioRows() {
  return {
      row("readBlock", &readBlock),         row("writeBlock", &writeBlock),       row("copyBlock", &copyBlock),
      row("hashRange", &hashRange),         row("compareRanges", &compareRanges), row("createFile", &createFile),
      row("exchangePaths", &exchangePaths),
  };
}

}  // namespace viaduct::binding
