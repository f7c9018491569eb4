// Which engine computes a call of attention: cuDNN, for what it takes (attention_cut.h), or own kernels (attention.h). The same
// code under emulation.
#pragma once

#include <string>

#include "attention_cut.h"
#include "attention_sdpa.h"
#include "device.h"
#include "launch.cuh"

namespace viaduct::cuda {

/// "auto": cuDNN where it takes the call; "cudnn": nothing else; "own": own kernels. Throws ERR_UNSUPPORTED for others, and for
/// "cudnn" where there is none. Process-wide.
void setAttentionEngine(const std::string& name);
/// Lets equal calls have unequal bits where that is faster: cuDNN's backward pass. Process-wide; not so at first.
void allowNondeterministicAttention(bool allowed);
/// What `auto` uses, for the description of the device.
std::string attentionLibrary();

/// The engine's choice for a call; made when the op is called, so that plans are built and errors thrown there.
struct AttentionChoice {
  std::shared_ptr<const SdpaPlan> plan;  // null: own kernels
  size_t scratch = 0;                    // bytes
  SdpaGpu gpu;
};
AttentionChoice chooseAttention(const char* op, const AttentionArgs& a, bool backward, const Device& device);

/// From a command.
void startChosen(const AttentionChoice& choice, const AttentionArgs& a, bool backward, const Launch& on, void* scratch);

}  // namespace viaduct::cuda
