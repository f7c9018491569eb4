// Which calls of attention cuDNN takes, and how a call becomes cuDNN's. The one place that decides; functions of the arguments
// alone, the same under emulation.
#pragma once

#include <string>

#include "attention_sdpa.h"

namespace viaduct::cuda {

/// What a choice depends on beside the call.
struct SdpaGpu {
  int computeCapability = 90;  // 10 * major + minor
  bool deterministic = true;   // whether equal calls must have equal bits

  SdpaGpu(int capability = 90, bool equalBits = true) : computeCapability(capability), deterministic(equalBits) {}
};

/// Why cuDNN does not take this call on this GPU; empty: it does.
std::string whyNotCudnn(const AttentionArgs& a, bool backward, const SdpaGpu& gpu);
inline bool cudnnTakes(const AttentionArgs& a, bool backward, const SdpaGpu& gpu) {
  return whyNotCudnn(a, backward, gpu).empty();
}

/// A call as cuDNN's calls of one shape. Where the heads of all groups lie evenly apart it is one call; else, as in a packed
/// qkv, one for each sample, with the groups in place of the batch, or for some groups of it, so that its scratch memory is
/// bounded. Keys that no query sees are left out.
struct SdpaCut {
  SdpaShape shape;
  int64_t calls = 1;
  int64_t groups = 1;  // of a sample in a call

  /// Where a call begins.
  int64_t sampleOf(int64_t call, const AttentionArgs& a) const { return call / (a.G / groups); }
  int64_t groupOf(int64_t call, const AttentionArgs& a) const { return call % (a.G / groups) * groups; }
};
/// From the first keys of a sample to the next one's, in numbers: so that each begins at an address of 16 bytes.
inline int64_t firstKeysRow(const AttentionArgs& a) { return (a.S + 3) / 4 * 4; }
SdpaCut cutForCudnn(const AttentionArgs& a, bool backward, const SdpaGpu& gpu);

}  // namespace viaduct::cuda
