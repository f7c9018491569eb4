// Scaled dot-product attention as cuDNN takes it: 4-D tensors, of which heads lie evenly apart. attention_cut.cc cuts
// attention's ops into such; cuDNN computes them (attention_cudnn.cc), or plain loops under emulation
// (emulation/attention_cudnn_host.cc). Strides are in elements; channels are contiguous.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../attention_args.h"
#include "../plugin.h"
#include "runtime.h"

namespace viaduct::cuda {

struct SdpaStrides {
  int64_t batch = 0, head = 0, position = 0;
};

/// Everything that a plan depends on. Query i sees the keys j with j <= i + shift where it is causal, and j > i + shift - window
/// where there is a window; the shift is 0 or, `bottomRight`, keys - queries.
struct SdpaShape {
  bool backward = false;
  bool deterministic = true;  // of a backward pass: equal calls have equal bits
  DType dtype = DType::BF16;  // or F16
  int64_t batch = 0, heads = 0, keyHeads = 0, queries = 0, keys = 0, channels = 0, valueChannels = 0;
  SdpaStrides q, k, v, out, dOut, dq, dk, dv;
  float scale = 1, softcap = 0;
  bool causal = false, bottomRight = false;
  int64_t window = 0;    // 0: none
  bool lengths = false;  // each of the batch has queries and keys of its own number, from the front
  // Each query has a first key that it sees; rows of these numbers lie so far apart in the batch, 0: one row for all. -1: none.
  int64_t firstKeys = -1;

  /// Equal for equal shapes.
  std::vector<int64_t> key() const;
};

/// Memory of one call. `stats` is the natural logarithm of the sum of exponentials of scaled scores, F32, packed
/// [batch, heads, queries]; lengths are I32 [batch], first keys I32 [batch, queries] or [queries].
struct SdpaData {
  void *q = nullptr, *k = nullptr, *v = nullptr, *out = nullptr;
  void *dOut = nullptr, *dq = nullptr, *dk = nullptr, *dv = nullptr;
  float* stats = nullptr;
  int32_t *queryLengths = nullptr, *keyLengths = nullptr, *firstKeys = nullptr;
};

/// A shape ready to run. What a call leaves undefined: results of queries that see no key, and gradients of
/// keys and queries behind their lengths.
class SdpaPlan {
 public:
  virtual ~SdpaPlan() = default;
  /// Scratch memory of a call, in bytes.
  virtual size_t workspace() const = 0;
  /// From a command of the stream.
  virtual void run(const SdpaData& data, cudaStream_t stream, void* workspace) const = 0;
};

/// For which GPU a plan is: one of this machine or, with `properties` (cuDNN's JSON), one that is not here, whose plans cannot
/// run.
struct SdpaTarget {
  int gpu = 0;
  int computeCapability = 90;  // 10 * major + minor
  std::string properties = "";
};

/// Throws ERR_UNSUPPORTED with cuDNN's reason when it has no plan, or is missing. The GPU is the thread's current one.
std::unique_ptr<SdpaPlan> makeSdpaPlan(const SdpaShape& shape, const SdpaTarget& target);
/// The library's name and version. Throws ERR_UNSUPPORTED when it is missing.
std::string sdpaLibrary();
void sdpaOptions(const DeviceOptions& options);

}  // namespace viaduct::cuda
