// The communicator of CPU ranks: program order, checks, timeouts and the words of errors around a Link. Ranks of one host
// speak through shared memory, others through Gloo's connections.
#pragma once

#include <memory>
#include <string>

#include "../comm.h"

namespace viaduct::cpu {

struct CommOptions {
  /// Key in the store, so another one for each attempt; the group's name is what stands before a '#'.
  std::string name = "world";
  int rank = 0;
  int size = 1;
  /// This host's address as the other ranks reach it.
  std::string address = "127.0.0.1";
  /// For connecting and, until setTimeout(), for each operation.
  int64_t timeoutMs = 600000;
  /// Whether ranks of one host may share memory.
  bool sharedMemory = true;
};

/// The communicator of the whole world; every rank calls it. A world of one needs no store (null) and no network.
std::unique_ptr<Communicator> connectWorld(Store* store, const CommOptions& options);

}  // namespace viaduct::cpu
