// Boxes of tensors in files; see block.h. A box becomes rows that are contiguous in the file; rows that lie next to each other
// are fetched by one read. Others are read one by one: a call costs less than reading what a rank does not own.
#include "block.h"

#include <algorithm>
#include <memory>

#include "../cpu/cast.h"
#include "../errors.h"
#include "scratch.h"

namespace viaduct::io {
namespace {

constexpr int64_t kWantedPerGap = 100;      // a read may hold 1% of bytes that nobody wants, to save calls
constexpr int64_t kDirectBytes = 16 << 10;  // rows from this size on are written from where they are

/// A box as rows: `run` elements that are contiguous in the file and `memoryStride` apart in memory, over `dims` outer dims.
struct Rows {
  int dims = 0;
  int64_t count[kMaxDims] = {};
  int64_t fileStride[kMaxDims] = {};
  int64_t memoryStride[kMaxDims] = {};
  int64_t run = 1;
  int64_t runStride = 1;
  int64_t fileStart = 0;  // elements
  int64_t total = 1;      // rows
};

Rows rowsOf(const FileTensor& file, const Dims& start, const TensorRef& memory, const char* where) {
  VIADUCT_CHECK(file.shape.n == memory.ndim && start.n == memory.ndim, "ERR_SHAPE", where,
                "expected start, box and file tensor of one rank, got " + std::to_string(start.n) + ", " +
                    std::to_string(memory.ndim) + " and " + std::to_string(file.shape.n));
  struct Dim {
    int64_t count, file, memory;
  };
  Rows rows;
  Dim dims[kMaxDims + 1];
  int n = 0;
  int64_t stride = 1;
  // From the innermost dim out; a dim joins the one inside of it when both sides step over it without a gap.
  for (int d = memory.ndim - 1; d >= 0; --d) {
    const int64_t size = memory.shape[d];
    VIADUCT_CHECK(start.v[d] >= 0 && size >= 0 && start.v[d] <= file.shape.v[d] - size, "ERR_SHAPE", where,
                  "expected a box inside of dim " + std::to_string(d) + " of " + std::to_string(file.shape.v[d]) +
                      ", got " + std::to_string(start.v[d]) + " to " + std::to_string(start.v[d] + size));
    rows.fileStart += start.v[d] * stride;
    const Dim dim{size, stride, memory.stride[d]};
    stride *= file.shape.v[d];
    if (size == 1) continue;
    if (n > 0 && dim.file == dims[n - 1].count * dims[n - 1].file &&
        dim.memory == dims[n - 1].count * dims[n - 1].memory) {
      dims[n - 1].count *= size;
    } else {
      dims[n++] = dim;
    }
  }
  if (memory.numel() == 0) {
    rows.total = 0;
    return rows;
  }
  int first = 0;
  if (n > 0 && dims[0].file == 1) {
    rows.run = dims[0].count;
    rows.runStride = dims[0].memory;
    first = 1;
  }
  for (int i = n - 1; i >= first; --i) {
    rows.count[rows.dims] = dims[i].count;
    rows.fileStride[rows.dims] = dims[i].file;
    rows.memoryStride[rows.dims] = dims[i].memory;
    rows.total *= dims[i].count;
    rows.dims += 1;
  }
  return rows;
}

/// Steps through the rows in the file's order.
struct Walk {
  explicit Walk(const Rows& rows) : rows(rows), file(rows.fileStart) {}
  void next() {
    for (int d = rows.dims - 1; d >= 0; --d) {
      file += rows.fileStride[d];
      memory += rows.memoryStride[d];
      if (++at[d] < rows.count[d]) return;
      file -= rows.count[d] * rows.fileStride[d];
      memory -= rows.count[d] * rows.memoryStride[d];
      at[d] = 0;
    }
  }
  const Rows& rows;
  int64_t at[kMaxDims] = {};
  int64_t file;
  int64_t memory = 0;
};

cpu::CastRow conversion(DType to, DType from, const char* where) {
  cpu::CastRow cast = cpu::castRow(to, from);
  VIADUCT_CHECK(
      cast != nullptr, "ERR_DTYPE", where,
      std::string("expected two floating or two integer dtypes, got ") + dtypeName(from) + " and " + dtypeName(to));
  return cast;
}

}  // namespace

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

void readBlock(const File& file, const FileTensor& x, const Dims& start, const TensorRef& y) {
  const Rows rows = rowsOf(x, start, y, "readBlock");
  cpu::CastRow cast = conversion(y.dtype, x.dtype, "readBlock");
  const auto width = static_cast<int64_t>(dtypeBytes(x.dtype));
  const auto yWidth = static_cast<int64_t>(dtypeBytes(y.dtype));
  const bool direct = x.dtype == y.dtype && (rows.runStride == 1 || rows.run == 1);
  const int64_t rowBytes = rows.run * width;
  auto* base = static_cast<char*>(y.data);
  std::unique_ptr<Scratch> scratch;

  Walk walk(rows);
  for (int64_t row = 0; row < rows.total;) {
    // Gather rows for one read.
    Walk ahead = walk;
    int64_t end = walk.file * width + rowBytes;
    int64_t group = 1;
    int64_t gaps = 0;
    while (row + group < rows.total) {
      ahead.next();
      const int64_t begin = ahead.file * width;
      gaps += begin - end;
      if (gaps * kWantedPerGap > (group + 1) * rowBytes || begin + rowBytes - walk.file * width > kScratchBytes) break;
      end = begin + rowBytes;
      group += 1;
    }
    if (group == 1 && direct) {
      file.readAt(base + walk.memory * yWidth, static_cast<size_t>(rowBytes), x.offset + walk.file * width);
      walk.next();
      row += 1;
      continue;
    }
    if (!scratch) scratch = std::make_unique<Scratch>();
    const int64_t begin = walk.file;
    if (group > 1) {
      file.readAt(scratch->data(), static_cast<size_t>(end - begin * width), x.offset + begin * width);
      for (int64_t i = 0; i < group; ++i, walk.next()) {
        cast(base + walk.memory * yWidth, rows.runStride, scratch->data() + (walk.file - begin) * width, 1, rows.run);
      }
    } else {  // one row, perhaps longer than the scratch memory
      const int64_t most = kScratchBytes / width;
      for (int64_t i = 0; i < rows.run; i += most) {
        const int64_t n = std::min(most, rows.run - i);
        file.readAt(scratch->data(), static_cast<size_t>(n * width), x.offset + (begin + i) * width);
        cast(base + (walk.memory + i * rows.runStride) * yWidth, rows.runStride, scratch->data(), 1, n);
      }
      walk.next();
    }
    row += group;
  }
}

void placeBlock(const char* bytes, DType dtype, const Dims& shape, const Dims& start, const TensorRef& y) {
  const Rows rows = rowsOf(FileTensor{0, dtype, shape}, start, y, "placeBlock");
  cpu::CastRow cast = conversion(y.dtype, dtype, "placeBlock");
  const auto width = static_cast<int64_t>(dtypeBytes(dtype));
  const auto yWidth = static_cast<int64_t>(dtypeBytes(y.dtype));
  auto* base = static_cast<char*>(y.data);
  Walk walk(rows);
  for (int64_t row = 0; row < rows.total; ++row, walk.next()) {
    cast(base + walk.memory * yWidth, rows.runStride, bytes + walk.file * width, 1, rows.run);
  }
}

void writeBlock(const File& file, const FileTensor& y, const Dims& start, const TensorRef& x) {
  const Rows rows = rowsOf(y, start, x, "writeBlock");
  cpu::CastRow cast = conversion(y.dtype, x.dtype, "writeBlock");
  const auto width = static_cast<int64_t>(dtypeBytes(y.dtype));
  const auto xWidth = static_cast<int64_t>(dtypeBytes(x.dtype));
  const bool direct = x.dtype == y.dtype && (rows.runStride == 1 || rows.run == 1);
  const auto* base = static_cast<const char*>(x.data);
  std::unique_ptr<Scratch> scratch;
  int64_t held = 0;  // bytes in scratch that belong to file position heldAt
  int64_t heldAt = 0;
  auto flush = [&] {
    if (held > 0) file.writeAt(scratch->data(), static_cast<size_t>(held), heldAt);
    held = 0;
  };

  Walk walk(rows);
  for (int64_t row = 0; row < rows.total; ++row, walk.next()) {
    const int64_t at = y.offset + walk.file * width;
    if (direct && rows.run * width >= kDirectBytes) {
      flush();
      file.writeAt(base + walk.memory * xWidth, static_cast<size_t>(rows.run * width), at);
      continue;
    }
    if (!scratch) scratch = std::make_unique<Scratch>();
    for (int64_t i = 0; i < rows.run;) {  // neighbours in the file are written by one call
      if (held > 0 && heldAt + held != at + i * width) flush();
      if (held == 0) heldAt = at + i * width;
      const int64_t n = std::min((kScratchBytes - held) / width, rows.run - i);
      cast(scratch->data() + held, 1, base + (walk.memory + i * rows.runStride) * xWidth, rows.runStride, n);
      held += n * width;
      i += n;
      if (kScratchBytes - held < width) flush();
    }
  }
  flush();
}

void copyBlock(const File& from, const FileTensor& x, const Dims& xStart, const File& to, const FileTensor& y,
               const Dims& yStart, const Dims& size) {
  int64_t elements = 1;
  for (int d = 0; d < size.n; ++d) elements *= size.v[d];
  if (elements == 0) return;
  const int64_t most = kScratchBytes / static_cast<int64_t>(dtypeBytes(y.dtype));
  if (elements > most) {  // cut along the first dim that has a length
    int d = 0;
    while (size.v[d] == 1) d += 1;
    const int64_t inner = elements / size.v[d];
    const int64_t step = std::max<int64_t>(1, most / inner);
    for (int64_t i = 0; i < size.v[d]; i += step) {
      Dims xAt = xStart;
      Dims yAt = yStart;
      Dims part = size;
      xAt.v[d] += i;
      yAt.v[d] += i;
      part.v[d] = std::min(step, size.v[d] - i);
      copyBlock(from, x, xAt, to, y, yAt, part);
    }
    return;
  }
  Scratch scratch;
  TensorRef box;
  box.data = scratch.data();
  box.dtype = y.dtype;
  box.ndim = size.n;
  int64_t stride = 1;
  for (int d = size.n - 1; d >= 0; --d) {
    box.shape[d] = size.v[d];
    box.stride[d] = stride;
    stride *= size.v[d];
  }
  readBlock(from, x, xStart, box);
  writeBlock(to, y, yStart, box);
}

}  // namespace viaduct::io
