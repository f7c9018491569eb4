// Connecting, order, watchdog and errors of an NCCL communicator; see nccl_group.h. NCCL runs without blocking: a call that is
// in progress is asked for until it is through, so that a failure or an abort ends every wait.
#include "nccl_group.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace viaduct::cuda {

namespace {

constexpr auto kLook = std::chrono::milliseconds(20);          // of the watchdog, while something runs
constexpr auto kSlow = std::chrono::milliseconds(1000);        // an operation that runs longer is told to the others
constexpr auto kHearOthers = std::chrono::milliseconds(1500);  // longer than kSlow: who is in the operation has told it
constexpr auto kLeave = std::chrono::seconds(10);
constexpr int64_t kStoreSliceMs = 500;  // between looks for an abort

std::string seconds(int64_t milliseconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f s", static_cast<double>(milliseconds) / 1e3);
  return text;
}

}  // namespace

NcclGroup::NcclGroup(CudaBackend& backend, const DeviceGroupOptions& options, ncclComm_t made)
    : nccl_(nccl()),
      backend_(backend),
      device_(backend.device()),
      host_(options.host),
      store_(options.store),
      roll_(options.store, options.key, options.host->rank(), options.host->size()),
      timeoutMs_(std::max<int64_t>(1, options.timeoutMs)),
      comm_(made) {}

NcclGroup::~NcclGroup() {
  if (stream_ == nullptr) return;
  device_.makeCurrent();
  cudaStreamDestroy(stream_);
}

void NcclGroup::start() {
  watchdog_ = std::thread([self = shared_from_this()] { self->watch(); });
}

void NcclGroup::close() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  if (watchdog_.joinable()) watchdog_.join();
}

// ---- words

std::string NcclGroup::ranks(const std::vector<int>& members) const {
  std::string text = members.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < members.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(host_->worldRanks()[static_cast<size_t>(members[i])]);
  }
  return text;
}

std::string NcclGroup::place(const CommTicket& ticket) const {
  return "operation " + std::to_string(ticket.sequence) + " of group " + host_->name();
}

Error NcclGroup::refused(const char* op, ncclResult_t result) {
  const char* detail = nccl_.getLastError(comm_);
  return Error("ERR_COMM", op,
               "expected NCCL to succeed in group " + host_->name() + ", got \"" + nccl_.getErrorString(result) + "\"" +
                   (detail == nullptr || *detail == 0 ? "" : std::string(" (") + detail + ")") +
                   ": NCCL_DEBUG=INFO says more");
}

Error NcclGroup::overdue(const Flight& flight) {
  roll_.tell(flight);
  const RollCall::Others others = roll_.others(flight, kHearOthers);
  const char* op = commOpName(flight.ticket.op);
  std::string last;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    last = "; last operations of this rank: " + record_.text();
  }
  if (others.different >= 0) {
    return Error("ERR_COMM", op,
                 "expected " + ranks({others.different}) + " at " + place(flight.ticket) + " with " +
                     std::to_string(flight.ticket.bytes) + " bytes, got " + others.what +
                     ": all ranks must call the same collectives in the same order" + last);
  }
  const std::string head =
      "expected all ranks in " + place(flight.ticket) + " within " + seconds(timeoutMs_.load()) + ", ";
  if (others.absent.empty()) {
    return Error("ERR_TIMEOUT", op,
                 head + "got all, but it did not end: a GPU or a connection between GPUs is stalled" + last);
  }
  return Error("ERR_TIMEOUT", op,
               head + "not heard from " + ranks(others.absent) +
                   ": it is stopped, slower than the timeout, or at another operation" + last);
}

/// NCCL knows that a peer is gone, not which one.
Error NcclGroup::lost(ncclResult_t result) {
  std::optional<Flight> flight;
  std::string last;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    record_.look();
    if (const Flight* running = record_.running()) flight = *running;
    last = "; last operations of this rank: " + record_.text();
  }
  const Error plain = refused("nccl", result);
  if (result != ncclRemoteError && result != ncclSystemError) return plain;
  if (!flight) return Error(plain.code, plain.where, std::string(plain.what()).substr(7) + last);
  roll_.tell(*flight);
  const RollCall::Others others = roll_.others(*flight, kHearOthers);
  if (const auto reason = roll_.givenUp()) {
    return Error("ERR_COMM", commOpName(flight->ticket.op), place(flight->ticket) + " ended because " + *reason);
  }
  const std::string who = others.absent.empty() ? "a connection" : ranks(others.absent);
  return Error("ERR_COMM", commOpName(flight->ticket.op),
               place(flight->ticket) + " lost " + who + ": see that rank's output (" + nccl_.getErrorString(result) +
                   ")" + last);
}

// ---- order

CommTicket NcclGroup::issue(CommOp op, uint64_t bytes, int64_t payload, std::vector<int> peers) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (failure_) {
    throw Error("ERR_COMM", commOpName(op), "group " + host_->name() + " ended earlier: " + failure_->what());
  }
  const CommTicket ticket = order_.issue(op, bytes, payload);
  record_.add(ticket, order_.fingerprint(), std::move(peers));
  return ticket;
}

/// Once there is one. A copy: who fails a stream for it must not hold the lock, because that aborts this group too.
Error NcclGroup::failure() {
  std::lock_guard<std::mutex> lock(mutex_);
  return *failure_;
}

/// In commands, whose stream has then failed for that reason.
void NcclGroup::throwIfFailed() {
  if (failed_.load()) throw failure();
}

/// Holds the turn of a ticket, which passes with it.
class NcclGroup::Turn {
 public:
  Turn(NcclGroup& group, const CommTicket& ticket) : group_(group) {
    {
      std::unique_lock<std::mutex> lock(group_.mutex_);
      group_.changed_.wait(lock, [&] { return (group_.ready_ && group_.turn_ == ticket.turn) || group_.failure_; });
    }
    group_.throwIfFailed();
  }
  ~Turn() {
    {
      std::lock_guard<std::mutex> lock(group_.mutex_);
      group_.turn_ += 1;
    }
    group_.changed_.notify_all();
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  NcclGroup& group_;
};

void NcclGroup::run(const CommTicket& ticket, CudaStream& s,
                    const std::function<ncclResult_t(ncclComm_t, cudaStream_t)>& call) {
  const char* op = commOpName(ticket.op);
  const Turn turn(*this, ticket);
  const std::shared_ptr<DeviceEvent> begin = device_.event(), end = device_.event();
  try {
    std::lock_guard<std::mutex> calls(calls_);
    throwIfFailed();
    VIADUCT_CHECK(comm_ != nullptr, "ERR_COMM", op, "expected an open group, got " + host_->name() + ", closed");
    check(cudaEventRecord(begin->get(), s.get()), "cudaEventRecord");
    check(cudaStreamWaitEvent(stream_, begin->get(), 0), "cudaStreamWaitEvent");
    {
      std::lock_guard<std::mutex> lock(mutex_);
      record_.begins(ticket.turn, begin);
    }
    changed_.notify_all();
    settle(call(comm_, stream_), op);
    check(cudaEventRecord(end->get(), stream_), "cudaEventRecord");
    std::lock_guard<std::mutex> lock(mutex_);
    record_.ends(ticket.turn, end);
  } catch (const Error& error) {
    this->end(error);
    throw;
  }
  check(cudaStreamWaitEvent(s.get(), end->get(), 0), "cudaStreamWaitEvent");
  // What an aborted operation leaves behind is no result: the stream fails once the GPU is past it.
  s.whenPassed([self = shared_from_this(), &s, at = s.place()](std::exception_ptr) {
    if (!self->failed_.load()) return;
    const Error error = self->failure();
    std::string text = error.what();
    text.erase(0, text.find("] ") + 2);
    s.fail(std::make_exception_ptr(Error(error.code, error.where, text + (at.empty() ? "" : " (in " + at + ")"))));
  });
}

void NcclGroup::settle(ncclResult_t result, const char* op) {
  await(comm_, result, op, Clock::time_point::max());  // the watchdog knows when it takes too long
}

void NcclGroup::await(ncclComm_t comm, ncclResult_t result, const char* op, Clock::time_point deadline) {
  auto pause = std::chrono::microseconds(20);
  while (result == ncclInProgress) {
    throwIfFailed();
    if (Clock::now() >= deadline) {
      const std::vector<int> missing = roll_.notJoined();
      throw Error("ERR_TIMEOUT", op,
                  "expected the ranks of group " + host_->name() + " to connect through NCCL within " +
                      seconds(timeoutMs_.load()) + ", not heard from " + (missing.empty() ? "some" : ranks(missing)) +
                      ": NCCL_DEBUG=INFO shows which addresses are tried (NCCL_SOCKET_IFNAME chooses)");
    }
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 2, std::chrono::microseconds(2000));
    const ncclResult_t asked = nccl_.commGetAsyncError(comm, &result);
    if (asked != ncclSuccess) result = asked;
  }
  if (result == ncclSuccess) return;
  throw result == ncclRemoteError ? lost(result) : refused(op, result);
}

std::string NcclGroup::nextSplit(int colour) {
  std::lock_guard<std::mutex> lock(mutex_);
  return roll_.key() + "/" + std::to_string(splits_++) + "." + std::to_string(colour);
}

std::shared_ptr<NcclGroup> NcclGroup::split(const CommTicket& ticket, int colour, int key,
                                            const std::function<std::unique_ptr<Communicator>()>& splitHost,
                                            const std::string& storeKey) {
  ncclComm_t made = nullptr;
  try {
    const std::shared_ptr<Communicator> host = splitHost();
    const Turn turn(*this, ticket);
    device_.makeCurrent();
    const auto deadline = Clock::now() + std::chrono::milliseconds(timeoutMs_.load());
    {
      const std::string name = host == nullptr ? "" : host->name();
      ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
      config.blocking = 0;
      config.commName = name.c_str();
      std::lock_guard<std::mutex> calls(calls_);
      throwIfFailed();
      VIADUCT_CHECK(comm_ != nullptr, "ERR_COMM", "split", "expected an open group, got " + host_->name() + ", closed");
      await(comm_, nccl_.commSplit(comm_, colour < 0 ? NCCL_SPLIT_NOCOLOR : colour, key, &made, &config), "split",
            deadline);
      if (made != nullptr) await(made, ncclInProgress, "split", deadline);
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      record_.done(ticket.turn);
    }
    if (host == nullptr || made == nullptr) return nullptr;
    auto part =
        std::make_shared<NcclGroup>(backend_, DeviceGroupOptions{host, store_, storeKey, timeoutMs_.load()}, made);
    part->start();
    return part;
  } catch (const Error& error) {
    if (made != nullptr) nccl_.commAbort(made);
    end(error);
    throw;
  }
}

void NcclGroup::end(const Error& error) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (failure_) return;
    failure_ = error;
    failed_.store(true);
  }
  changed_.notify_all();
}

// ---- the watchdog

void NcclGroup::watch() {
  try {
    device_.makeCurrent();
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    if (comm_ == nullptr) connect();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ready_ = true;
    }
    changed_.notify_all();
    while (lookOnce()) {}
  } catch (const Error& error) {
    end(error);
  } catch (const std::exception& error) {
    end(Error("ERR_NATIVE", "nccl", error.what()));
  }
  leave(failed_.load());
}

void NcclGroup::connect() {
  const int rank = host_->rank();
  const int64_t timeout = timeoutMs_.load();
  const auto deadline = Clock::now() + std::chrono::milliseconds(timeout);
  const std::string key = "nccl/" + roll_.key() + "/id";
  roll_.join();
  ncclUniqueId id;
  if (rank == 0) {
    const ncclResult_t result = nccl_.getUniqueId(&id);
    if (result != ncclSuccess) throw refused("connect", result);
    store_->set(key, std::vector<uint8_t>(id.internal, id.internal + sizeof id.internal));
  } else {
    for (;;) {
      throwIfFailed();
      try {
        const std::vector<uint8_t> bytes = store_->get(key, kStoreSliceMs);
        VIADUCT_CHECK(
            bytes.size() == sizeof id.internal, "ERR_COMM", "connect",
            "expected an id of " + std::to_string(sizeof id.internal) + " bytes, got " + std::to_string(bytes.size()));
        std::memcpy(id.internal, bytes.data(), bytes.size());
        break;
      } catch (const Error& error) {
        if (error.code != "ERR_TIMEOUT") throw;
        VIADUCT_CHECK(Clock::now() < deadline, "ERR_TIMEOUT", "connect",
                      "expected the ranks of group " + host_->name() + " to connect through NCCL within " +
                          seconds(timeout) + ", not heard from " + ranks({0}));
      }
    }
  }
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  config.commName = host_->name().c_str();
  std::lock_guard<std::mutex> calls(calls_);
  await(comm_, nccl_.commInitRankConfig(&comm_, host_->size(), id, rank, &config), "connect", deadline);
}

/// One look at what runs. False when the group has ended or is to be left.
bool NcclGroup::lookOnce() {
  std::optional<Flight> running;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    if (record_.open())
      changed_.wait_for(lock, kLook);
    else
      changed_.wait(lock, [this] { return failure_ || closing_ || record_.open(); });
    if (failure_ || closing_) return false;
    record_.look();
    if (const Flight* flight = record_.running()) running = *flight;
  }
  {
    std::unique_lock<std::mutex> calls(calls_, std::try_to_lock);
    ncclResult_t result = ncclSuccess;
    if (calls.owns_lock()) {
      const ncclResult_t asked = nccl_.commGetAsyncError(comm_, &result);
      if (asked != ncclSuccess) result = asked;
      calls.unlock();
      if (result != ncclSuccess && result != ncclInProgress) throw lost(result);
    }
  }
  if (!running) return true;
  const auto timeout = std::chrono::milliseconds(timeoutMs_.load());
  const auto now = Clock::now();
  const auto slow = std::min<Clock::duration>(kSlow, timeout / 4);
  if (now - running->started > timeout) throw overdue(*running);
  if (now - running->started < slow || now < nextAsk_) return true;
  nextAsk_ = now + slow;
  if (told_ != running->ticket.turn) roll_.tell(*running);
  told_ = running->ticket.turn;
  if (const auto reason = roll_.givenUp()) {
    throw Error("ERR_COMM", commOpName(running->ticket.op), place(running->ticket) + " ended because " + *reason);
  }
  return true;
}

/// The last of the watchdog. A group that has not failed waits for its operations first.
void NcclGroup::leave(bool failed) {
  const auto deadline = Clock::now() + kLeave;
  if (!failed) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (record_.open() && !failure_ && Clock::now() < deadline) {
      changed_.wait_for(lock, kLook);
      record_.look();
    }
    failed = failure_ || record_.open();
  } else {
    std::unique_lock<std::mutex> lock(mutex_);
    const std::string reason = failure_->what();
    lock.unlock();
    roll_.giveUp(host_->worldRanks()[static_cast<size_t>(host_->rank())], reason);
  }
  end(Error("ERR_COMM", "close", "group " + host_->name() + " was closed"));
  std::lock_guard<std::mutex> calls(calls_);
  if (comm_ == nullptr) return;
  if (!failed) {
    ncclResult_t result = nccl_.commFinalize(comm_);
    while (result == ncclInProgress && Clock::now() < deadline) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      nccl_.commGetAsyncError(comm_, &result);
    }
    failed = result != ncclSuccess;
  }
  if (failed)
    nccl_.commAbort(comm_);
  else
    nccl_.commDestroy(comm_);
  comm_ = nullptr;
}

}  // namespace viaduct::cuda
