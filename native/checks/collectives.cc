// The checks of collectives; see collectives.h.
#include "collectives.h"

#include "../errors.h"

namespace viaduct {

namespace {

void checkContiguous(const char* op, const TensorRef& t) {
  VIADUCT_CHECK(t.contiguous(), "ERR_LAYOUT", op,
                "expected a contiguous tensor, got " + describe(t) + ": copy it into a fresh tensor first");
}

void checkDtypes(const char* op, const TensorRef& out, const TensorRef& in) {
  VIADUCT_CHECK(out.dtype == in.dtype, "ERR_DTYPE", op,
                "expected out and in of one dtype, got " + describe(out) + " and " + describe(in));
}

std::vector<size_t> bytesOfCounts(const std::vector<int64_t>& counts, const TensorRef& t, int size) {
  int64_t sum = 0;
  std::vector<size_t> bytes;
  for (int64_t n : counts) {
    VIADUCT_CHECK(n >= 0 && n <= t.numel(), "ERR_SHAPE", "allToAll", "got a count of " + std::to_string(n));
    sum += n;
    bytes.push_back(static_cast<size_t>(n) * dtypeBytes(t.dtype));
  }
  VIADUCT_CHECK(static_cast<int>(counts.size()) == size && sum == t.numel(), "ERR_SHAPE", "allToAll",
                "expected a count for each of " + std::to_string(size) + " ranks with a sum of " +
                    std::to_string(t.numel()) + ", got " + std::to_string(counts.size()) + " with a sum of " +
                    std::to_string(sum));
  return bytes;
}

}  // namespace

void checkCollective(const char* op, const TensorRef& out, const TensorRef& in, int64_t outBlocks, int64_t inBlocks) {
  checkContiguous(op, out);
  checkContiguous(op, in);
  checkDtypes(op, out, in);
  VIADUCT_CHECK(out.numel() * inBlocks == in.numel() * outBlocks, "ERR_SHAPE", op,
                "expected " + std::to_string(outBlocks) + " blocks out and " + std::to_string(inBlocks) +
                    " in, of equal size, got " + describe(out) + " and " + describe(in));
}

void checkBroadcast(const TensorRef& buffer, int root, int size) {
  checkContiguous("broadcast", buffer);
  VIADUCT_CHECK(root >= 0 && root < size, "ERR_COMM", "broadcast",
                "expected a root of 0 to " + std::to_string(size - 1) + ", got " + std::to_string(root));
}

void checkTransfers(const std::vector<P2p>& group, int rank, int size) {
  for (const P2p& p : group) {
    checkContiguous("pointToPoint", p.tensor);
    VIADUCT_CHECK(p.peer >= 0 && p.peer < size && p.peer != rank, "ERR_COMM", "pointToPoint",
                  "expected another rank of 0 to " + std::to_string(size - 1) + ", got " + std::to_string(p.peer));
  }
}

ExchangeBytes checkAllToAll(const TensorRef& out, const TensorRef& in, const std::vector<int64_t>& sendCounts,
                            const std::vector<int64_t>& recvCounts, int rank, int size) {
  checkContiguous("allToAll", out);
  checkContiguous("allToAll", in);
  checkDtypes("allToAll", out, in);
  ExchangeBytes bytes{bytesOfCounts(sendCounts, in, size), bytesOfCounts(recvCounts, out, size)};
  const auto own = static_cast<size_t>(rank);
  VIADUCT_CHECK(bytes.send[own] == bytes.recv[own], "ERR_SHAPE", "allToAll",
                "expected one count from this rank to itself, got " + std::to_string(sendCounts[own]) + " and " +
                    std::to_string(recvCounts[own]));
  return bytes;
}

void refuseReduction(const char* op, const TensorRef& in) {
  throw Error("ERR_DTYPE", op, "expected a dtype that can be summed, got " + describe(in) + ": cast it first");
}

}  // namespace viaduct
