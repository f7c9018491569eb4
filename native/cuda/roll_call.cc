// Ranks that tell each other where they are; see roll_call.h.
#include "roll_call.h"

#include <sstream>
#include <thread>

namespace viaduct::cuda {

namespace {

constexpr int64_t kReadMs = 1000;  // the key is there: only the store can be slow
constexpr auto kLook = std::chrono::milliseconds(50);

}  // namespace

std::optional<std::string> RollCall::read(const std::string& name) {
  const std::string key = "nccl/" + key_ + "/" + name;
  try {
    if (store_ == nullptr || !store_->check(key)) return std::nullopt;
    const std::vector<uint8_t> bytes = store_->get(key, kReadMs);
    return std::string(bytes.begin(), bytes.end());
  } catch (const std::exception&) {
    return std::nullopt;
  }
}

void RollCall::write(const std::string& name, const std::string& text) {
  try {
    if (store_ != nullptr) store_->set("nccl/" + key_ + "/" + name, std::vector<uint8_t>(text.begin(), text.end()));
  } catch (const std::exception&) {
    return;  // the store is gone, and with it those who would read this
  }
}

void RollCall::join() { write("joined/" + std::to_string(rank_), "1"); }

std::vector<int> RollCall::notJoined() {
  std::vector<int> ranks;
  for (int r = 0; r < size_; ++r) {
    if (r != rank_ && !read("joined/" + std::to_string(r))) ranks.push_back(r);
  }
  return ranks;
}

void RollCall::tell(const Flight& flight) {
  std::ostringstream text;
  text << flight.ticket.sequence << ' ' << flight.ticket.bytes << ' ' << flight.print << ' '
       << commOpName(flight.ticket.op);
  write("at/" + std::to_string(rank_), text.str());
}

RollCall::Others RollCall::others(const Flight& flight, Clock::duration patience) {
  Others others;
  if (flight.ticket.op == CommOp::PointToPoint) {
    others.absent = flight.peers;
    return others;
  }
  const auto until = Clock::now() + patience;
  std::vector<int> asked;
  for (int r = 0; r < size_; ++r) {
    if (r != rank_) asked.push_back(r);
  }
  for (;;) {
    others.absent.clear();
    for (int r : asked) {
      const auto text = read("at/" + std::to_string(r));
      uint64_t sequence = 0, bytes = 0, print = 0;
      std::string op;
      std::istringstream words(text.value_or(""));
      if (!(words >> sequence >> bytes >> print >> op) || sequence < flight.ticket.sequence) {
        others.absent.push_back(r);
      } else if (sequence == flight.ticket.sequence && print != flight.print && others.different < 0) {
        others.different = r;
        others.what = op + " with " + std::to_string(bytes) + " bytes";
      }
    }
    if (others.absent.empty() || Clock::now() >= until) return others;
    asked = others.absent;
    std::this_thread::sleep_for(kLook);
  }
}

void RollCall::giveUp(int worldRank, const std::string& reason) {
  if (!read("failed")) write("failed", "rank " + std::to_string(worldRank) + " gave up: " + reason);
}

std::optional<std::string> RollCall::givenUp() { return read("failed"); }

}  // namespace viaduct::cuda
