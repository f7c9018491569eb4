// Rows for files: boxes of tensors in and out, moves between files, hashes, comparisons, reserved files. Those that touch a
// file answer with a promise and run on the pool. Nothing orders them against streams: the caller waits for the tensor's stream first.
//
// A tensor in a file is (path, byte offset, dtype, shape), row-major. `yStart`/`xStart` choose the box inside of the tensor
// in memory, `start` the box inside of the file's tensor; both have the size `size`.
#include <unordered_map>

#include "../io/block.h"
#include "../io/digest.h"
#include "../io/move.h"
#include "../io/reach.h"
#include "bind.h"

namespace viaduct::binding {
namespace {

Promise readBlock(Env& env, const std::string& path, int64_t offset, DType dtype, const Dims& shape, const Dims& start,
                  const Dims& size, PinnedOut y, const Dims& yStart) {
  const TensorRef box = io::boxOf(y, yStart, size, "readBlock");
  return async(env, [=, y = std::move(y)] {
    const io::File file = io::File::forReading(path);
    io::intoBox(y.pin->backend(), box, [&](const TensorRef& piece, const Dims& at) {
      io::readBlock(file, io::FileTensor{offset, dtype, shape}, io::shifted(start, at), piece);
    });
  });
}

Promise writeBlock(Env& env, const std::string& path, int64_t offset, DType dtype, const Dims& shape, const Dims& start,
                   const Dims& size, Pinned x, const Dims& xStart) {
  const TensorRef box = io::boxOf(x, xStart, size, "writeBlock");
  return async(env, [=, x = std::move(x)] {
    const io::File file = io::File::forWriting(path);
    io::fromBox(x.pin->backend(), box, [&](const TensorRef& piece, const Dims& at) {
      io::writeBlock(file, io::FileTensor{offset, dtype, shape}, io::shifted(start, at), piece);
    });
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

/// Moves that can be told to stop, by the number that JavaScript gave them. Used on its thread; moves keep the flags alive.
class Stops {
 public:
  using Flag = std::shared_ptr<std::atomic<bool>>;
  Flag flag(int64_t id) {
    std::weak_ptr<std::atomic<bool>>& known = flags_[id];
    Flag flag = known.lock();
    if (!flag) known = flag = std::make_shared<std::atomic<bool>>(false);
    return flag;
  }
  void stop(int64_t id) {
    const auto found = flags_.find(id);
    if (found == flags_.end()) return;
    if (const Flag flag = found->second.lock()) *flag = true;
    flags_.erase(found);
  }
  void close() {
    while (!flags_.empty()) stop(flags_.begin()->first);
  }

 private:
  std::unordered_map<int64_t, std::weak_ptr<std::atomic<bool>>> flags_;
};

/// A move as JavaScript hands it over, in doubles: rank, the box as path number, offset, dtype, shape; then for each other
/// tensor the same and its number of regions, and for each region start in the box, start in the other, size.
class MoveReader {
 public:
  MoveReader(const BytesIn& plan, const char* where) : numbers_(plan.size / sizeof(double)), where_(where) {
    std::memcpy(numbers_.data(), plan.data, numbers_.size() * sizeof(double));
  }
  io::Move read(const std::vector<std::string>& paths) {
    io::Move move;
    move.paths = paths;
    rank_ = static_cast<int>(next(0, kMaxDims));
    move.box = tensor(paths.size());
    while (at_ < numbers_.size()) {
      io::Move::Other other{tensor(paths.size()), {}};
      const int64_t regions = next(0, static_cast<int64_t>(numbers_.size()));
      other.regions.reserve(static_cast<size_t>(regions));
      for (int64_t i = 0; i < regions; ++i) {
        const Dims box = dims(), start = dims(), size = dims();
        other.regions.push_back({box, start, size});
      }
      move.others.push_back(std::move(other));
    }
    return move;
  }

 private:
  int64_t next(int64_t least, int64_t most) {
    VIADUCT_CHECK(at_ < numbers_.size(), "ERR_USAGE", where_, "expected a whole plan, got its end");
    const double x = numbers_[at_++];
    VIADUCT_CHECK(x >= static_cast<double>(least) && x <= static_cast<double>(most), "ERR_USAGE", where_,
                  "expected number " + std::to_string(at_) + " of the plan within " + std::to_string(least) + " and " +
                      std::to_string(most) + ", got " + std::to_string(x));
    return static_cast<int64_t>(x);
  }
  Dims dims() {
    Dims d;
    d.n = rank_;
    for (int i = 0; i < rank_; ++i) d.v[i] = next(0, int64_t{1} << 53);
    return d;
  }
  io::PlacedTensor tensor(size_t paths) {
    io::PlacedTensor t;
    t.path = static_cast<size_t>(next(0, static_cast<int64_t>(paths) - 1));
    t.tensor.offset = next(0, int64_t{1} << 53);
    t.tensor.dtype = static_cast<DType>(next(0, 14));
    t.tensor.shape = dims();
    return t;
  }
  std::vector<double> numbers_;
  const char* where_;
  size_t at_ = 0;
  int rank_ = 0;
};

Stops::Flag stopOf(Env& env, int64_t stopId) { return stopId == 0 ? nullptr : env.part<Stops>().flag(stopId); }

template <std::string (*run)(const io::Move&)>
Promise startMove(Env& env, const char* where, const std::vector<std::string>& paths, const BytesIn& plan, bool hash,
                  int64_t stopId) {
  io::Move move = MoveReader(plan, where).read(paths);
  move.hash = hash;
  Stops::Flag stop = stopOf(env, stopId);
  return async(env, [move = std::move(move), stop = std::move(stop)]() mutable {
    move.stop = stop.get();
    return run(move);
  });
}

Promise gatherBox(Env& env, const std::vector<std::string>& paths, BytesIn plan, bool hash, int64_t stopId) {
  return startMove<io::gatherBox>(env, "gatherBox", paths, plan, hash, stopId);
}

Promise scatterBox(Env& env, const std::vector<std::string>& paths, BytesIn plan, bool hash, int64_t stopId) {
  return startMove<io::scatterBox>(env, "scatterBox", paths, plan, hash, stopId);
}

/// Regions of a file's tensor into `y`, which the plan names as its one other tensor.
Promise readHashed(Env& env, const std::vector<std::string>& paths, BytesIn plan, PinnedOut y, int64_t stopId) {
  io::Move move = MoveReader(plan, "readHashed").read(paths);
  Stops::Flag stop = stopOf(env, stopId);
  return async(env, [move = std::move(move), y = std::move(y), stop = std::move(stop)]() mutable {
    move.stop = stop.get();
    return io::readHashed(move, y, y.pin->backend());
  });
}

void stopMoves(Env& env, int64_t stopId) { env.part<Stops>().stop(stopId); }

Value ioCounters() {
  const io::Counters c = io::counters();
  return Value(Value::Record{{"bytesRead", c.bytesRead}, {"bytesWritten", c.bytesWritten}});
}

bool hasSha256() { return io::hasSha256(); }

Promise sha256Range(Env& env, const std::string& path, int64_t offset, int64_t bytes) {
  return async(env, [=] { return io::sha256Range(io::File::forReading(path), offset, bytes); });
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

bool tryLock(int fd) { return io::tryLock(fd); }

}  // namespace

std::vector<Row> ioRows() {
  return {
      row("readBlock", &readBlock),         row("writeBlock", &writeBlock),       row("copyBlock", &copyBlock),
      row("hashRange", &hashRange),         row("compareRanges", &compareRanges), row("createFile", &createFile),
      row("exchangePaths", &exchangePaths), row("gatherBox", &gatherBox),         row("scatterBox", &scatterBox),
      row("readHashed", &readHashed),       row("stopMoves", &stopMoves),         row("ioCounters", &ioCounters),
      row("hasSha256", &hasSha256),         row("sha256Range", &sha256Range),     row("tryLock", &tryLock),
  };
}

}  // namespace viaduct::binding
