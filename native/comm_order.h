// The program order of a group of ranks: an operation takes a ticket when it is called, and what all ranks must agree on is
// hashed. Of every transport. The owner locks.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace viaduct {

enum class CommOp : uint16_t {
  AllReduce = 1,
  AllGather = 2,
  ReduceScatter = 3,
  Broadcast = 4,
  AllToAll = 5,
  PointToPoint = 6,
  Barrier = 7,
  GatherBytes = 8,
  Split = 9,
};

inline const char* commOpName(CommOp op) {
  switch (op) {
    case CommOp::AllReduce:
      return "allReduce";
    case CommOp::AllGather:
      return "allGather";
    case CommOp::ReduceScatter:
      return "reduceScatter";
    case CommOp::Broadcast:
      return "broadcast";
    case CommOp::AllToAll:
      return "allToAll";
    case CommOp::PointToPoint:
      return "pointToPoint";
    case CommOp::Barrier:
      return "barrier";
    case CommOp::GatherBytes:
      return "gatherBytes";
    case CommOp::Split:
      return "split";
  }
  return "unknown";
}

/// A well-mixed hash of two words.
inline uint64_t mix(uint64_t a, uint64_t b) {
  uint64_t x = a ^ (b + 0x9e3779b97f4a7c15ull + (a << 6) + (a >> 2));
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

/// An operation's place. `sequence` counts what all ranks call; a transfer between two ranks has that of what follows it.
struct CommTicket {
  uint64_t turn = 0;
  CommOp op = CommOp::Barrier;
  uint64_t sequence = 0;
  uint64_t bytes = 0;  // where they are the same on all ranks; else 0
};

class CommOrder {
 public:
  /// `payload`: what this rank puts in, in bytes.
  CommTicket issue(CommOp op, uint64_t bytes, int64_t payload) {
    const CommTicket ticket{tickets_++, op, collectives_, bytes};
    if (op != CommOp::PointToPoint) {
      print_ = mix(print_, mix(collectives_, mix(static_cast<uint64_t>(op), bytes)));
      collectives_ += 1;
    }
    payload_[op] += payload;
    return ticket;
  }
  uint64_t fingerprint() const { return print_; }
  int64_t sequence() const { return static_cast<int64_t>(tickets_); }
  std::vector<std::pair<std::string, int64_t>> payload() const {
    std::vector<std::pair<std::string, int64_t>> byName;
    for (const auto& [op, bytes] : payload_) byName.emplace_back(commOpName(op), bytes);
    return byName;
  }

 private:
  uint64_t tickets_ = 0;
  uint64_t collectives_ = 0;
  uint64_t print_ = 0;
  std::map<CommOp, int64_t> payload_;
};

}  // namespace viaduct
