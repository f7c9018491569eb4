// What collectives take, on any transport: checked on the caller's thread before an operation gets its place in the order.
#pragma once

#include <vector>

#include "../comm.h"

namespace viaduct {

inline size_t commBytes(const TensorRef& t) { return static_cast<size_t>(t.numel()) * dtypeBytes(t.dtype); }

/// Contiguous, of one dtype, with so many equal blocks in `out` and `in`.
void checkCollective(const char* op, const TensorRef& out, const TensorRef& in, int64_t outBlocks, int64_t inBlocks);
void checkBroadcast(const TensorRef& buffer, int root, int size);
void checkTransfers(const std::vector<P2p>& group, int rank, int size);

/// What goes to and comes from each rank, in bytes.
struct ExchangeBytes {
  std::vector<size_t> send, recv;
};
ExchangeBytes checkAllToAll(const TensorRef& out, const TensorRef& in, const std::vector<int64_t>& sendCounts,
                            const std::vector<int64_t>& recvCounts, int rank, int size);

[[noreturn]] void refuseReduction(const char* op, const TensorRef& in);

}  // namespace viaduct
