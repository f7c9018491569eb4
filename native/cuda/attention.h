// Own kernels of attention (ops/attention_forward.cu, attention_backward.cu), as attention_engine.cc starts them.
#pragma once

#include "../attention_args.h"
#include "launch.cuh"

namespace viaduct::cuda {

constexpr int64_t kMostChannels = 256;  // of a head, for own kernels

/// Scratch memory of a call, in bytes.
size_t ownForwardScratch(const AttentionArgs& a);
size_t ownBackwardScratch(const AttentionArgs& a);
/// From a command.
void startOwnForward(const AttentionArgs& a, const Launch& on, void* scratch);
void startOwnBackward(const AttentionArgs& a, const Launch& on, void* scratch);

}  // namespace viaduct::cuda
