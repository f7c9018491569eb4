// The record of a group's operations; see flight_record.h. Tickets are numbered without gaps, so a turn tells the place.
#include "flight_record.h"

#include <algorithm>
#include <cstdio>

namespace viaduct::cuda {

namespace {

constexpr size_t kKept = 64;   // ended operations
constexpr size_t kShown = 12;  // of them all, in errors

}  // namespace

void FlightRecord::add(const CommTicket& ticket, uint64_t print, std::vector<int> peers) {
  Flight flight;
  flight.ticket = ticket;
  flight.print = print;
  flight.peers = std::move(peers);
  flights_.push_back(std::move(flight));
}

Flight* FlightRecord::find(uint64_t turn) {
  if (flights_.empty() || turn < flights_.front().ticket.turn) return nullptr;
  const size_t at = turn - flights_.front().ticket.turn;
  return at < flights_.size() ? &flights_[at] : nullptr;
}

void FlightRecord::begins(uint64_t turn, std::shared_ptr<DeviceEvent> event) {
  Flight* flight = find(turn);
  if (flight != nullptr) flight->begin = std::move(event);
}

void FlightRecord::ends(uint64_t turn, std::shared_ptr<DeviceEvent> event) {
  Flight* flight = find(turn);
  if (flight != nullptr) flight->end = std::move(event);
}

void FlightRecord::done(uint64_t turn) {
  Flight* flight = find(turn);
  if (flight != nullptr) flight->state = FlightState::Done;
}

void FlightRecord::look() {
  for (Flight& flight : flights_) {
    if (flight.state == FlightState::Done) continue;
    if (flight.state == FlightState::Enqueued) {
      if (flight.begin == nullptr || !flight.begin->passed()) break;  // they run in order
      flight.state = FlightState::Started;
      flight.started = Clock::now();
    }
    if (flight.end == nullptr || !flight.end->passed()) break;
    flight.state = FlightState::Done;
    flight.begin = flight.end = nullptr;
  }
  while (flights_.size() > kKept && flights_.front().state == FlightState::Done) flights_.pop_front();
}

const Flight* FlightRecord::running() const {
  const auto found = std::find_if(flights_.begin(), flights_.end(),
                                  [](const Flight& flight) { return flight.state == FlightState::Started; });
  return found == flights_.end() ? nullptr : &*found;
}

std::string FlightRecord::text() const {
  // What runs is of interest, with what came before it.
  size_t last = flights_.size();
  for (size_t i = 0; i < flights_.size(); ++i) {
    if (flights_[i].state != FlightState::Done) {
      last = std::min(flights_.size(), i + kShown / 3);
      break;
    }
  }
  std::string text;
  for (size_t i = last > kShown ? last - kShown : 0; i < last; ++i) {
    const Flight& flight = flights_[i];
    text += (text.empty() ? "" : ", ") + std::to_string(flight.ticket.sequence) + " " + commOpName(flight.ticket.op);
    if (flight.ticket.bytes > 0) text += " of " + std::to_string(flight.ticket.bytes) + " bytes";
    if (flight.state == FlightState::Done) text += " done";
    if (flight.state == FlightState::Enqueued) text += " enqueued";
    if (flight.state == FlightState::Started) {
      char seconds[32];
      std::snprintf(seconds, sizeof seconds, "%.1f",
                    std::chrono::duration<double>(Clock::now() - flight.started).count());
      text += std::string(" started ") + seconds + " s ago";
    }
  }
  if (last < flights_.size()) text += ", " + std::to_string(flights_.size() - last) + " more enqueued";
  return text;
}

}  // namespace viaduct::cuda
