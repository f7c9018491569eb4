// What the ranks of a group tell each other through the store when an operation takes long: where each of them is, and why one
// gave up. NCCL itself says neither. Calls block for as long as the store does and never throw: a store that is gone knows
// nothing.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../comm.h"
#include "flight_record.h"

namespace viaduct::cuda {

class RollCall {
 public:
  RollCall(std::shared_ptr<Store> store, std::string key, int rank, int size)
      : store_(std::move(store)), key_(std::move(key)), rank_(rank), size_(size) {}

  const std::string& key() const { return key_; }

  /// This rank takes part from now on.
  void join();
  /// Ranks that have not joined.
  std::vector<int> notJoined();

  /// This rank is in `flight`.
  void tell(const Flight& flight);
  struct Others {
    std::vector<int> absent;  // ranks not heard from in this operation
    int different = -1;       // a rank that is at another one under the same number
    std::string what;         // that one
  };
  /// Where the others are; waits for up to `patience` for those not heard from.
  Others others(const Flight& flight, Clock::duration patience);

  /// The first reason counts. `rank` is the world's.
  void giveUp(int worldRank, const std::string& reason);
  /// "rank 3 gave up: ..." as another rank has told.
  std::optional<std::string> givenUp();

 private:
  std::optional<std::string> read(const std::string& name);
  void write(const std::string& name, const std::string& text);

  const std::shared_ptr<Store> store_;
  const std::string key_;
  const int rank_, size_;
};

}  // namespace viaduct::cuda
