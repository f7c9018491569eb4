// Gloo's connections between all ranks of the world, and links over them for groups of ranks. Groups share connections and
// are told apart by the slots of their messages. The rest of the code never sees Gloo.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../comm.h"
#include "link.h"

namespace viaduct::cpu {

class GlooMesh {
 public:
  virtual ~GlooMesh() = default;
  /// A link for the group of these world ranks; `id` is equal on its members and on no other group.
  virtual std::unique_ptr<Link> link(std::vector<int> worldRanks, int rank, uint64_t id) = 0;

  /// Connects all ranks with each other; every rank calls it. `address` is this host's, as the others reach it.
  /// Throws ERR_TIMEOUT naming the ranks that did not come, ERR_UNSUPPORTED where the addon was built without Gloo.
  static std::shared_ptr<GlooMesh> connect(Store& store, const std::string& name, int rank, int size,
                                           const std::string& address, int64_t timeoutMs);
};

}  // namespace viaduct::cpu
