// The communicator of ranks with a GPU each: NCCL behind comm.h. The communicator has a CUDA stream of its own; events order it
// with the streams that operations are called on. A thread of its own, the watchdog, connects, looks for what takes too long or
// has failed, and aborts. Host values go through the host's communicator, which stands beside it.
#pragma once

#include <memory>

#include "../plugin.h"
#include "cuda_backend.h"

namespace viaduct::cuda {

/// See Plugin::connect.
std::unique_ptr<Communicator> connectNccl(CudaBackend& backend, const DeviceGroupOptions& options);

}  // namespace viaduct::cuda
