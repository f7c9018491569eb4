// Progress of the shared-memory link: one thread moves all transfers of an exchange forward, sleeping on its own futex
// ("bell") when none can move. A transfer is a header (its tag and length, checked by the receiver) and its bytes.
#include "shm_link.h"

#ifdef __linux__

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>

namespace viaduct::cpu {
namespace {

constexpr uint64_t kMagic = 0x7669616475637431ull;
constexpr size_t kMostRanks = 64;
constexpr size_t kReasonBytes = 1024;
constexpr size_t kPiece = 65536;  // bytes copied before the other side is told
constexpr auto kSpin = std::chrono::microseconds(30);
constexpr auto kLook = std::chrono::milliseconds(10);  // how often a sleeper looks whether its peers live

static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free);

struct alignas(64) RankState {
  std::atomic<uint32_t> bell;
  std::atomic<uint32_t> sleeping;
  std::atomic<uint32_t> gaveUp;  // 0, else the how-manieth of the group
  char reason[kReasonBytes];
};

struct alignas(64) Ring {
  alignas(64) std::atomic<uint64_t> written;
  alignas(64) std::atomic<uint64_t> read;
};

struct alignas(4096) Head {
  uint64_t magic;
  uint64_t nonce;
  uint64_t size;
  uint64_t ringBytes;
  std::atomic<uint32_t> endings;
  RankState ranks[kMostRanks];
};

struct Header {
  Tag tag;
  uint64_t bytes;
};

size_t ringBytesFor(int size) {
  // At most 16 MiB a group; a ring that stays in the second-level cache is the fastest.
  size_t bytes = size_t{256} << 10;
  const auto rings = static_cast<size_t>(size) * static_cast<size_t>(size - 1);
  while (bytes > (size_t{32} << 10) && rings * bytes > (size_t{16} << 20)) bytes /= 2;
  return bytes;
}

size_t fileBytes(int size) {
  const auto n = static_cast<size_t>(size);
  return sizeof(Head) + n * n * (sizeof(Ring) + ringBytesFor(size));
}

bool readAddress(const std::string& address, std::string& path, uint64_t& nonce) {
  const size_t space = address.find(' ');
  if (space == std::string::npos) return false;
  path = address.substr(0, space);
  nonce = std::strtoull(address.c_str() + space + 1, nullptr, 16);
  return path.rfind("/dev/shm/viaduct-", 0) == 0 && path.find("..") == std::string::npos;
}

void futexWake(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void futexWait(std::atomic<uint32_t>* word, uint32_t seen, std::chrono::nanoseconds most) {
  timespec time{};
  time.tv_sec = most.count() / 1000000000;
  time.tv_nsec = most.count() % 1000000000;
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT, seen, &time, nullptr, 0);
}

bool lockByte(int fd, int rank) {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return fcntl(fd, F_OFD_SETLK, &lock) == 0;
}

/// Whether some other open file holds the byte: the rank's process lives and has the group open.
bool lockedByOther(int fd, int rank) {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return fcntl(fd, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

class ShmLink final : public Link {
 public:
  ShmLink(int fd, void* memory, int rank, int size)
      : fd_(fd), memory_(static_cast<char*>(memory)), rank_(rank), size_(size), ringBytes_(ringBytesFor(size)) {}

  ~ShmLink() override {
    munmap(memory_, fileBytes(size_));
    close(fd_);
  }

  const char* kind() const override { return "shm"; }
  size_t chunkBytes() const override { return ringBytes_ / 2; }

  void exchange(const std::vector<Transfer>& transfers, Clock::time_point deadline) override;

  void abort(const std::string& reason) override {
    RankState& mine = head().ranks[rank_];
    if (mine.gaveUp.load() == 0) {
      const size_t n = std::min(reason.size(), kReasonBytes - 1);
      std::memcpy(mine.reason, reason.data(), n);
      mine.reason[n] = 0;
      mine.gaveUp.store(head().endings.fetch_add(1) + 1);
    }
    for (int r = 0; r < size_; ++r) ring(r);
  }

 private:
  struct Moving {
    const Transfer* transfer;
    size_t done = 0;  // bytes of header and payload
  };
  /// Transfers of one direction with one peer, in order.
  struct Lane {
    int peer;
    bool send;
    size_t next = 0;
    std::vector<Moving> list;
  };

  Head& head() { return *reinterpret_cast<Head*>(memory_); }
  Ring& ringOf(int from, int to) { return reinterpret_cast<Ring*>(memory_ + sizeof(Head))[from * size_ + to]; }
  char* bytesOf(int from, int to) {
    const auto n = static_cast<size_t>(size_);
    return memory_ + sizeof(Head) + n * n * sizeof(Ring) + static_cast<size_t>(from * size_ + to) * ringBytes_;
  }
  void ring(int rank) {
    RankState& state = head().ranks[rank];
    state.bell.fetch_add(1);
    if (state.sleeping.load() != 0) futexWake(&state.bell);
  }

  bool advance(Lane& lane);
  size_t push(int peer, const char* from, size_t bytes);
  size_t pull(int peer, char* to, size_t bytes);
  void checkHeader(int peer, const Transfer& expected, const Header& got);
  void checkPeers(const std::vector<Lane>& lanes, bool look);
  bool inboxEmpty(int peer) {
    Ring& r = ringOf(peer, rank_);
    return r.written.load(std::memory_order_acquire) == r.read.load(std::memory_order_relaxed);
  }

  const int fd_;
  char* const memory_;
  const int rank_;
  const int size_;
  const size_t ringBytes_;
  Header incoming_[kMostRanks];  // headers that are being received
};

size_t ShmLink::push(int peer, const char* from, size_t bytes) {
  Ring& r = ringOf(rank_, peer);
  const uint64_t written = r.written.load(std::memory_order_relaxed);
  const size_t room = ringBytes_ - static_cast<size_t>(written - r.read.load(std::memory_order_acquire));
  const size_t n = std::min({bytes, room, kPiece});
  if (n == 0) return 0;
  const size_t at = static_cast<size_t>(written) & (ringBytes_ - 1);
  const size_t first = std::min(n, ringBytes_ - at);
  std::memcpy(bytesOf(rank_, peer) + at, from, first);
  std::memcpy(bytesOf(rank_, peer), from + first, n - first);
  r.written.store(written + n, std::memory_order_release);
  return n;
}

size_t ShmLink::pull(int peer, char* to, size_t bytes) {
  Ring& r = ringOf(peer, rank_);
  const uint64_t read = r.read.load(std::memory_order_relaxed);
  const size_t there = static_cast<size_t>(r.written.load(std::memory_order_acquire) - read);
  const size_t n = std::min({bytes, there, kPiece});
  if (n == 0) return 0;
  const size_t at = static_cast<size_t>(read) & (ringBytes_ - 1);
  const size_t first = std::min(n, ringBytes_ - at);
  std::memcpy(to, bytesOf(peer, rank_) + at, first);
  std::memcpy(to + first, bytesOf(peer, rank_), n - first);
  r.read.store(read + n, std::memory_order_release);
  return n;
}

void ShmLink::checkHeader(int peer, const Transfer& expected, const Header& got) {
  const Tag& a = expected.tag;
  const Tag& b = got.tag;
  if (a.op == b.op && a.sequence == b.sequence && a.step == b.step && a.bytes == b.bytes && got.bytes == expected.bytes)
    return;
  throw LinkFailure{LinkFailure::Kind::Mismatch,
                    {peer},
                    std::string(commOpName(b.op)) + " (operation " + std::to_string(b.sequence) + ", step " +
                        std::to_string(b.step) + ", " + std::to_string(got.bytes) + " bytes)"};
}

/// Moves the lane's first open transfer; false when it could not move.
bool ShmLink::advance(Lane& lane) {
  bool moved = false;
  while (lane.next < lane.list.size()) {
    Moving& m = lane.list[lane.next];
    const Transfer& t = *m.transfer;
    size_t n;
    if (m.done < sizeof(Header)) {
      const size_t rest = sizeof(Header) - m.done;
      if (lane.send) {
        const Header header{t.tag, t.bytes};
        n = push(t.peer, reinterpret_cast<const char*>(&header) + m.done, rest);
      } else {
        n = pull(t.peer, reinterpret_cast<char*>(&incoming_[t.peer]) + m.done, rest);
        if (n == rest) checkHeader(t.peer, t, incoming_[t.peer]);
      }
    } else {
      const size_t at = m.done - sizeof(Header);
      char* data = static_cast<char*>(t.data) + at;
      n = lane.send ? push(t.peer, data, t.bytes - at) : pull(t.peer, data, t.bytes - at);
    }
    if (n == 0) break;
    m.done += n;
    moved = true;
    if (m.done == sizeof(Header) + t.bytes) {
      lane.next += 1;
    } else if (m.done > sizeof(Header)) {
      break;  // one piece, then the other lanes have their turn
    }
  }
  if (moved) ring(lane.peer);
  return moved;
}

/// Throws when this rank gave up, or a peer that it waits for, naming the first of the group that did; and (`look`) when
/// such a peer is gone. A rank that has ended is no fault to one that needs nothing more of it.
void ShmLink::checkPeers(const std::vector<Lane>& lanes, bool look) {
  Head& h = head();
  if (h.ranks[rank_].gaveUp.load() != 0) {
    throw LinkFailure{LinkFailure::Kind::Aborted, {}, h.ranks[rank_].reason};
  }
  for (const Lane& lane : lanes) {
    if (lane.next == lane.list.size() || h.ranks[lane.peer].gaveUp.load() == 0) continue;
    // What it wrote before it ended is still there to be read.
    if (!lane.send && !inboxEmpty(lane.peer)) continue;
    int first = lane.peer;
    for (int r = 0; r < size_; ++r) {
      const uint32_t order = h.ranks[r].gaveUp.load();
      if (order != 0 && order < h.ranks[first].gaveUp.load()) first = r;
    }
    h.ranks[first].reason[kReasonBytes - 1] = 0;
    throw LinkFailure{LinkFailure::Kind::PeerGaveUp, {first}, h.ranks[first].reason};
  }
  if (!look) return;
  for (const Lane& lane : lanes) {
    if (lane.next == lane.list.size() || lockedByOther(fd_, lane.peer)) continue;
    if (!lane.send && !inboxEmpty(lane.peer)) continue;
    throw LinkFailure{LinkFailure::Kind::PeerLost, {lane.peer}, "its process ended or closed the group"};
  }
}

void ShmLink::exchange(const std::vector<Transfer>& transfers, Clock::time_point deadline) {
  std::vector<Lane> lanes;
  for (const Transfer& t : transfers) {
    auto lane =
        std::find_if(lanes.begin(), lanes.end(), [&](const Lane& l) { return l.peer == t.peer && l.send == t.send; });
    if (lane == lanes.end()) lane = lanes.insert(lanes.end(), Lane{t.peer, t.send, 0, {}});
    lane->list.push_back(Moving{&t});
  }
  RankState& mine = head().ranks[rank_];
  Clock::time_point idleSince{}, looked = Clock::now();
  bool idle = false;
  for (;;) {
    const uint32_t seen = mine.bell.load();
    bool moved = false, open = false;
    for (Lane& lane : lanes) {
      if (lane.next < lane.list.size()) moved = advance(lane) || moved;
      open = open || lane.next < lane.list.size();
    }
    if (!open) return;
    if (moved) {
      idle = false;
      continue;
    }
    checkPeers(lanes, false);
    const auto now = Clock::now();
    if (!idle) {
      idle = true;
      idleSince = now;
    }
    if (now >= deadline) {
      LinkFailure failure{LinkFailure::Kind::Timeout, {}, ""};
      for (int pass = 0; pass < 2 && failure.peers.empty(); ++pass) {  // who sent nothing, else who took nothing
        for (const Lane& lane : lanes) {
          if (lane.send == (pass == 1) && lane.next < lane.list.size()) failure.peers.push_back(lane.peer);
        }
      }
      throw failure;
    }
    if (now - idleSince < kSpin) {
      sched_yield();
      continue;
    }
    if (now - looked >= kLook) {
      checkPeers(lanes, true);
      looked = now;
    }
    mine.sleeping.store(1);
    futexWait(&mine.bell, seen, std::min<std::chrono::nanoseconds>(kLook, deadline - now));
    mine.sleeping.store(0);
  }
}

}  // namespace

std::unique_ptr<ShmFile> ShmFile::create(int size, uint64_t nonce) {
  if (size < 2 || static_cast<size_t>(size) > kMostRanks) return nullptr;
  char name[96];
  std::snprintf(name, sizeof name, "/dev/shm/viaduct-%d-%016llx", static_cast<int>(getpid()),
                static_cast<unsigned long long>(nonce));
  const int fd = open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0) return nullptr;
  std::unique_ptr<ShmFile> file(new ShmFile(name, nonce));
  // Reserved, not only sized: a full memory file system must be noticed here and not as a bus error later.
  const auto bytes = fileBytes(size);
  bool ok = posix_fallocate(fd, 0, static_cast<off_t>(bytes)) == 0;
  if (ok) {
    void* memory = mmap(nullptr, sizeof(Head), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ok = memory != MAP_FAILED;
    if (ok) {
      auto* head = static_cast<Head*>(memory);  // zeros are the initial state of everything else
      head->nonce = nonce;
      head->size = static_cast<uint64_t>(size);
      head->ringBytes = ringBytesFor(size);
      head->magic = kMagic;
      munmap(memory, sizeof(Head));
    }
  }
  close(fd);
  if (!ok) return nullptr;
  return file;
}

std::string ShmFile::address() const {
  char text[32];
  std::snprintf(text, sizeof text, " %016llx", static_cast<unsigned long long>(nonce_));
  return path_ + text;
}

void ShmFile::unlink() {
  if (linked_) ::unlink(path_.c_str());
  linked_ = false;
}

std::unique_ptr<Link> attachShm(const std::string& address, int rank, int size) {
  std::string path;
  uint64_t nonce = 0;
  if (!readAddress(address, path, nonce)) return nullptr;
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW);
  if (fd < 0) return nullptr;
  struct stat info {};
  const size_t bytes = fileBytes(size);
  void* memory = MAP_FAILED;
  if (fstat(fd, &info) == 0 && info.st_size == static_cast<off_t>(bytes) && info.st_uid == geteuid()) {
    memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  }
  if (memory != MAP_FAILED) {
    const auto* head = static_cast<const Head*>(memory);
    if (head->magic == kMagic && head->nonce == nonce && head->size == static_cast<uint64_t>(size) &&
        lockByte(fd, rank)) {
      return std::make_unique<ShmLink>(fd, memory, rank, size);
    }
    munmap(memory, bytes);
  }
  close(fd);
  return nullptr;
}

}  // namespace viaduct::cpu

#else  // another system: the ranks speak through Gloo

namespace viaduct::cpu {

std::unique_ptr<ShmFile> ShmFile::create(int, uint64_t) { return nullptr; }
std::string ShmFile::address() const { return path_; }
void ShmFile::unlink() { linked_ = false; }
std::unique_ptr<Link> attachShm(const std::string&, int, int) { return nullptr; }

}  // namespace viaduct::cpu

#endif
