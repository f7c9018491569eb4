// The algorithms of collectives over a Link: direct exchange between all ranks, in chunks, every sum taken in rank order by
// one rank or by all alike. So a result does not depend on the algorithm or the chunk, and is bit-identical on all ranks.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../comm.h"
#include "link.h"

namespace viaduct::cpu {

/// One operation in progress.
struct Collective {
  Link& link;
  int rank;
  int size;
  Tag tag;
  Clock::time_point deadline;
  std::vector<char>& scratch;  // grows as needed; kept by the communicator
};

void runAllReduce(Collective c, void* out, const void* in, int64_t count, DType dtype, ReduceOp op);
void runReduceScatter(Collective c, void* out, const void* in, int64_t count, DType dtype, ReduceOp op);
void runAllGather(Collective c, void* out, const void* in, size_t bytes);
void runBroadcast(Collective c, void* buffer, size_t bytes, int root);
/// Byte counts per peer.
void runAllToAll(Collective c, void* out, const void* in, const std::vector<size_t>& send,
                 const std::vector<size_t>& recv);
void runBarrier(Collective c);
/// Every rank's bytes, in rank order. At most 64 MiB a rank.
std::vector<std::vector<uint8_t>> runGatherBytes(Collective c, const std::vector<uint8_t>& mine);

}  // namespace viaduct::cpu
