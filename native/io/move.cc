// See move.h. The box is cut into stretches that are boxes themselves and contiguous in the file; each stretch passes through
// one piece of scratch memory, to which block.cc reads and from which it writes.
#include "move.h"

#include <algorithm>
#include <memory>
#include <optional>

#include "../errors.h"
#include "digest.h"
#include "reach.h"
#include "scratch.h"

namespace viaduct::io {
namespace {

constexpr size_t kMostOpen = 64;
constexpr int64_t kWritebackBytes = int64_t{8} << 20;
constexpr int64_t kLeastWriteback = int64_t{1} << 20;  // what is less at the end of a call waits for the flush

int64_t volume(const Dims& size) {
  int64_t n = 1;
  for (int d = 0; d < size.n; ++d) n *= size.v[d];
  return n;
}

/// Files of one call, opened when first needed. Counts what is written to each and begins its writeback now and then.
class Files {
 public:
  Files(const Move& move, bool write) : move_(move), write_(write), files_(move.paths.size()) {}
  ~Files() { closeAll(); }
  Files(const Files&) = delete;
  Files& operator=(const Files&) = delete;

  const File& at(size_t i) {
    if (!files_[i].file) {
      if (open_ == kMostOpen) closeAll();
      const std::string& path = move_.paths[i];
      files_[i].file.emplace(write_ ? File::forWriting(path) : File::forReading(path));
      open_ += 1;
    }
    return *files_[i].file;
  }
  void wrote(size_t i, int64_t bytes) {
    files_[i].dirty += bytes;
    if (files_[i].dirty >= kWritebackBytes) startWriteback(files_[i]);
  }

 private:
  struct Entry {
    std::optional<File> file;
    int64_t dirty = 0;
  };
  static void startWriteback(Entry& entry) {
    if (entry.dirty >= kLeastWriteback) entry.file->startWriteback();
    entry.dirty = 0;
  }
  void closeAll() {
    for (Entry& entry : files_) {
      if (!entry.file) continue;
      startWriteback(entry);
      entry.file.reset();
    }
    open_ = 0;
  }

  const Move& move_;
  const bool write_;
  std::vector<Entry> files_;
  size_t open_ = 0;
};

/// A contiguous part of the box, in memory.
struct Stretch {
  Dims start;
  Dims size;
  TensorRef memory;  // row-major
  int64_t offset;    // bytes from the box's first
  int64_t bytes;
};

/// The stretches of the box in order, each at most as large as `scratch`.
template <typename F>
void stretches(const Move& move, const char* where, const Scratch& scratch, F each) {
  const FileTensor& box = move.box.tensor;
  const Dims& shape = box.shape;
  const auto width = static_cast<int64_t>(dtypeBytes(box.dtype));
  const int64_t most = kScratchBytes / width;
  int64_t inner = volume(shape);  // elements of one index of dim `cut`
  if (inner == 0) return;
  int cut = -1;
  while (cut + 1 < shape.n && (cut < 0 || inner > most)) inner /= shape.v[++cut];
  Stretch s;
  s.start.n = shape.n;
  s.size = shape;
  for (int d = 0; d < cut; ++d) s.size.v[d] = 1;
  s.offset = 0;
  for (;;) {
    if (move.stop != nullptr && *move.stop) throw Error("ERR_ABORTED", where, "the signal was aborted");
    if (cut >= 0) s.size.v[cut] = std::min(most / inner, shape.v[cut] - s.start.v[cut]);
    s.memory.data = scratch.data();
    s.memory.dtype = box.dtype;
    s.memory.ndim = shape.n;
    int64_t stride = 1;
    for (int d = shape.n - 1; d >= 0; --d) {
      s.memory.shape[d] = s.size.v[d];
      s.memory.stride[d] = stride;
      stride *= s.size.v[d];
    }
    s.bytes = stride * width;
    each(s);
    s.offset += s.bytes;
    int d = cut;
    for (; d >= 0; --d) {
      s.start.v[d] += s.size.v[d];
      if (s.start.v[d] < shape.v[d]) break;
      s.start.v[d] = 0;
    }
    if (d < 0) return;
  }
}

/// What a region has in a stretch: the memory of it, and where it starts in the stretch and in the other tensor. Empty where
/// they do not meet.
struct Meeting {
  TensorRef memory;
  Dims stretch;
  Dims other;
};
std::optional<Meeting> meet(const Stretch& stretch, const MoveRegion& region) {
  Meeting m{stretch.memory, stretch.start, region.other};
  int64_t offset = 0;
  for (int d = 0; d < region.size.n; ++d) {
    const int64_t begin = std::max(stretch.start.v[d], region.box.v[d]);
    const int64_t end = std::min(stretch.start.v[d] + stretch.size.v[d], region.box.v[d] + region.size.v[d]);
    if (end <= begin) return std::nullopt;
    m.memory.shape[d] = end - begin;
    m.stretch.v[d] = begin - stretch.start.v[d];
    m.other.v[d] += begin - region.box.v[d];
    offset += (begin - stretch.start.v[d]) * stretch.memory.stride[d];
  }
  m.memory.data = static_cast<char*>(m.memory.data) + offset * static_cast<int64_t>(dtypeBytes(m.memory.dtype));
  return m;
}

void checkRegions(const Move& move, const char* where) {
  const Dims& shape = move.box.tensor.shape;
  for (const Move::Other& other : move.others) {
    for (const MoveRegion& region : other.regions) {
      for (int d = 0; d < shape.n; ++d) {
        VIADUCT_CHECK(region.box.v[d] >= 0 && region.size.v[d] >= 0 && region.box.v[d] <= shape.v[d] - region.size.v[d],
                      "ERR_SHAPE", where,
                      "expected regions inside of dim " + std::to_string(d) + " of " + std::to_string(shape.v[d]) +
                          ", got " + std::to_string(region.box.v[d]) + " to " +
                          std::to_string(region.box.v[d] + region.size.v[d]));
      }
    }
  }
}

}  // namespace

std::string gatherBox(const Move& move) {
  checkRegions(move, "gatherBox");
  Files sources(move, false);
  Files targets(move, true);
  std::optional<Xxh3> hash;
  if (move.hash) hash.emplace();
  const Scratch scratch;
  stretches(move, "gatherBox", scratch, [&](const Stretch& stretch) {
    int64_t missing = stretch.memory.numel();
    for (const Move::Other& other : move.others) {
      for (const MoveRegion& region : other.regions) {
        const std::optional<Meeting> m = meet(stretch, region);
        if (!m) continue;
        readBlock(sources.at(other.place.path), other.place.tensor, m->other, m->memory);
        missing -= m->memory.numel();
      }
    }
    VIADUCT_CHECK(missing == 0, "ERR_COVERAGE", "gatherBox",
                  "expected regions that cover every element once, got " + std::to_string(missing) +
                      " too few in bytes " + std::to_string(stretch.offset) + " to " +
                      std::to_string(stretch.offset + stretch.bytes) + " of a tensor of " + move.paths[move.box.path]);
    if (hash) hash->update(scratch.data(), stretch.bytes);
    if (move.paths[move.box.path].empty()) return;  // hashed only
    targets.at(move.box.path)
        .writeAt(scratch.data(), static_cast<size_t>(stretch.bytes), move.box.tensor.offset + stretch.offset);
    targets.wrote(move.box.path, stretch.bytes);
  });
  return hash ? hash->hex() : "";
}

std::string scatterBox(const Move& move) {
  checkRegions(move, "scatterBox");
  Files sources(move, false);
  Files targets(move, true);
  std::optional<Xxh3> hash;
  if (move.hash) hash.emplace();
  const Scratch scratch;
  stretches(move, "scatterBox", scratch, [&](const Stretch& stretch) {
    sources.at(move.box.path)
        .readAt(scratch.data(), static_cast<size_t>(stretch.bytes), move.box.tensor.offset + stretch.offset);
    if (hash) hash->update(scratch.data(), stretch.bytes);
    for (const Move::Other& other : move.others) {
      const auto width = static_cast<int64_t>(dtypeBytes(other.place.tensor.dtype));
      for (const MoveRegion& region : other.regions) {
        const std::optional<Meeting> m = meet(stretch, region);
        if (!m) continue;
        writeBlock(targets.at(other.place.path), other.place.tensor, m->other, m->memory);
        targets.wrote(other.place.path, m->memory.numel() * width);
      }
    }
  });
  return hash ? hash->hex() : "";
}

std::string readHashed(const Move& move, const TensorRef& y, Backend& backend) {
  checkRegions(move, "readHashed");
  VIADUCT_CHECK(move.others.size() == 1, "ERR_USAGE", "readHashed",
                "expected one other tensor, got " + std::to_string(move.others.size()));
  const std::vector<MoveRegion>& regions = move.others[0].regions;
  for (const MoveRegion& region : regions) boxOf(y, region.other, region.size, "readHashed");
  const File file = File::forReading(move.paths[move.box.path]);
  Xxh3 hash;
  const Scratch scratch;
  stretches(move, "readHashed", scratch, [&](const Stretch& stretch) {
    file.readAt(scratch.data(), static_cast<size_t>(stretch.bytes), move.box.tensor.offset + stretch.offset);
    hash.update(scratch.data(), stretch.bytes);
    for (const MoveRegion& region : regions) {
      const std::optional<Meeting> m = meet(stretch, region);
      if (!m) continue;
      Dims size = stretch.size;
      std::copy_n(m->memory.shape, size.n, size.v);
      intoBox(backend, boxOf(y, m->other, size, "readHashed"), [&](const TensorRef& piece, const Dims& at) {
        placeBlock(scratch.data(), move.box.tensor.dtype, stretch.size, shifted(m->stretch, at), piece);
      });
    }
  });
  return hash.hex();
}

}  // namespace viaduct::io
