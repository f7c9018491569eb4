// What one NCCL communicator is between its operations: connecting, program order, the watchdog, failure and abort. Shared by
// the communicator, its commands and the watchdog's thread. nccl_comm.cc has the operations.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../comm_order.h"
#include "cuda_backend.h"
#include "flight_record.h"
#include "nccl_library.h"
#include "roll_call.h"

namespace viaduct::cuda {

class NcclGroup : public std::enable_shared_from_this<NcclGroup> {
 public:
  /// `made`: a communicator from a split; null to meet the others at the store.
  NcclGroup(CudaBackend& backend, const DeviceGroupOptions& options, ncclComm_t made);
  ~NcclGroup();
  NcclGroup(const NcclGroup&) = delete;
  NcclGroup& operator=(const NcclGroup&) = delete;
  /// Starts the watchdog; once, right after it was made.
  void start();
  /// Takes leave of the peers: waits for what was called, at most some seconds, else aborts.
  void close();

  Communicator& host() const { return *host_; }
  std::shared_ptr<Communicator> sharedHost() const { return host_; }
  CudaBackend& backend() const { return backend_; }

  /// An operation's place, on the caller's thread. Throws ERR_COMM when the group has ended.
  CommTicket issue(CommOp op, uint64_t bytes, int64_t payload, std::vector<int> peers = {});
  /// From a command of `s`: when the operation's turn has come, `call` starts it on the communicator's stream, behind all of
  /// `s` so far; what follows on `s` comes behind it.
  void run(const CommTicket& ticket, CudaStream& s, const std::function<ncclResult_t(ncclComm_t, cudaStream_t)>& call);
  /// From a thread that may block: cuts the communicator. Null for a negative colour.
  std::shared_ptr<NcclGroup> split(const CommTicket& ticket, int colour, int key,
                                   const std::function<std::unique_ptr<Communicator>()>& splitHost,
                                   const std::string& storeKey);
  std::string nextSplit(int colour);

  /// From any thread: the first failure ends the group.
  void end(const Error& error);
  void setTimeout(int64_t timeoutMs) { timeoutMs_.store(timeoutMs < 1 ? 1 : timeoutMs); }
  template <typename F>
  auto ordered(F&& read) -> decltype(read(std::declval<CommOrder&>())) {
    std::lock_guard<std::mutex> lock(mutex_);
    return read(order_);
  }

 private:
  class Turn;
  void watch();
  void connect();
  bool lookOnce();
  void settle(ncclResult_t result, const char* op);
  void await(ncclComm_t comm, ncclResult_t result, const char* op, Clock::time_point deadline);
  void leave(bool failed);
  Error failure();
  void throwIfFailed();
  Error refused(const char* op, ncclResult_t result);
  Error overdue(const Flight& flight);
  Error lost(ncclResult_t result);
  std::string ranks(const std::vector<int>& members) const;
  std::string place(const CommTicket& ticket) const;

  const Nccl& nccl_;
  CudaBackend& backend_;
  Device& device_;
  const std::shared_ptr<Communicator> host_;
  const std::shared_ptr<Store> store_;
  RollCall roll_;
  std::atomic<int64_t> timeoutMs_;
  std::thread watchdog_;

  std::mutex calls_;  // held while NCCL is called for comm_; before mutex_
  ncclComm_t comm_;
  cudaStream_t stream_ = nullptr;

  std::mutex mutex_;
  std::condition_variable changed_;
  bool ready_ = false;
  bool closing_ = false;
  uint64_t turn_ = 0;  // the ticket that may run
  std::optional<Error> failure_;
  std::atomic<bool> failed_{false};
  CommOrder order_;
  FlightRecord record_;
  int64_t splits_ = 0;
  // the watchdog's own
  uint64_t told_ = ~uint64_t{0};
  Clock::time_point nextAsk_{};
};

}  // namespace viaduct::cuda
