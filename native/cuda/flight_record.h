// What a group's last operations came to: called, given to the GPU, begun there, ended. For the words of errors, and to see
// which operation takes too long. The owner locks.
#pragma once

#include <chrono>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "../comm_order.h"
#include "device.h"

namespace viaduct::cuda {

using Clock = std::chrono::steady_clock;

enum class FlightState { Enqueued, Started, Done };

struct Flight {
  CommTicket ticket;
  uint64_t print = 0;      // of the order up to and with it
  std::vector<int> peers;  // of transfers between two ranks
  FlightState state = FlightState::Enqueued;
  std::shared_ptr<DeviceEvent> begin, end;  // null before it is given to the GPU
  Clock::time_point started{};
};

class FlightRecord {
 public:
  void add(const CommTicket& ticket, uint64_t print, std::vector<int> peers);
  /// The GPU has what precedes the operation.
  void begins(uint64_t turn, std::shared_ptr<DeviceEvent> event);
  void ends(uint64_t turn, std::shared_ptr<DeviceEvent> event);
  /// Of what the GPU has no part in.
  void done(uint64_t turn);
  /// Asks the GPU how far it is.
  void look();
  /// Whether any operation has not ended.
  bool open() const { return !flights_.empty() && flights_.back().state != FlightState::Done; }
  /// The first that has begun and not ended; null when there is none.
  const Flight* running() const;
  /// "4 allReduce of 64 bytes done, 5 allGather of 128 bytes started 2.0 s ago": the last ones, oldest first.
  std::string text() const;

 private:
  Flight* find(uint64_t turn);

  std::deque<Flight> flights_;
};

}  // namespace viaduct::cuda
