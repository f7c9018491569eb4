// One box of a file filled from regions of many files, or read once and spread over many or into memory: always in the order of
// the box's bytes, through bounded scratch memory, hashed on the way, with writeback begun early so that a later flush is short.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "../backend.h"
#include "block.h"

namespace viaduct::io {

/// `box` start in the box, `other` start in the other tensor, same size. In elements.
struct MoveRegion {
  Dims box;
  Dims other;
  Dims size;
};

struct PlacedTensor {
  size_t path = 0;  // index into Move::paths
  FileTensor tensor;
};

struct Move {
  std::vector<std::string> paths;
  PlacedTensor box;
  struct Other {
    PlacedTensor place;
    std::vector<MoveRegion> regions;
  };
  std::vector<Other> others;
  bool hash = true;
  const std::atomic<bool>* stop = nullptr;  // when set: ERR_ABORTED at the next stretch
};

/// Fills the whole box; elements that no region covers are refused (ERR_COVERAGE). Regions do not overlap. Returns the XXH3
/// of the bytes written, or "" without `hash`.
std::string gatherBox(const Move& move);
/// Reads the box once in order and writes its regions. Returns the XXH3 of the bytes read, or "" without `hash`.
std::string scatterBox(const Move& move);
/// Reads the box once in order and places its regions in `y`: the move's one other tensor, which is in the memory of `backend`.
/// Always hashes.
std::string readHashed(const Move& move, const TensorRef& y, Backend& backend);

}  // namespace viaduct::io
