// The Backend of an NVIDIA GPU: which op runs here, file by file. Meaning, shapes and dtypes of each op stand in ../backend.h;
// memory and streams live in cuda_backend.cc, each group of ops in the file that its comment names. How to add one: docs/cuda.md.
#pragma once

#include <initializer_list>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "../backend.h"
#include "../caching_allocator.h"
#include "../plugin.h"
#include "cuda_stream.h"
#include "device_memory.h"

namespace viaduct::cuda {

struct MatmulArgs;

class CudaBackend final : public Backend {
 public:
  // cuda_backend.cc
  explicit CudaBackend(const DeviceOptions& options);
  ~CudaBackend() override;
  const char* name() const override { return "cuda"; }
  std::string describe() const override;
  void* allocate(size_t bytes, Stream& stream) override;
  void release(void* memory, Stream& stream) override;
  MemoryStats memory() const override;
  void resetPeak() override;
  void setMemoryLimit(int64_t bytes) override;
  int64_t trim() override;
  void upload(Stream& s, Out y, std::shared_ptr<const void> hostBytes, size_t bytes) override;
  void download(Stream& s, std::shared_ptr<void> hostBytes, In x, size_t bytes) override;
  bool onHost() const override { return false; }
  void copyRows(void* to, size_t toPitch, const void* from, size_t fromPitch, size_t width, size_t rows,
                bool toHost) override;
  void copyBetween(Stream& s, Out y, In x, bool toHost) override;
  std::unique_ptr<Stream> createStream(int64_t id) override;
  void setNumThreads(int64_t n) override;
  void setMatmulEngine(const std::string& engine) override;
  void setGroupedMatmulEngine(const std::string& engine) override;
  void setAttentionEngine(const std::string& engine) override;
  void allowNondeterministic(bool allowed) override;
  int64_t numThreads() const override { return 1; }
  bool supports(const std::string& op, DType dtype, std::string* why) const override;
  Device& device() { return device_; }

  // ops/copy.cu
  void fill(Stream& s, Out y, double value) override;
  void copy(Stream& s, Out y, In x) override;

  // ops/elementwise.cu
  void add(Stream& s, Out y, In a, In b) override;
  void mul(Stream& s, Out y, In a, In b) override;
  void accumulate(Stream& s, InOut acc, In x) override;
  void scale(Stream& s, InOut x, In factor) override;
  void clamp(Stream& s, Out y, In x, double low, double high) override;
  void clampBackward(Stream& s, Out dx, In dy, In x, double low, double high) override;
  void addBias(Stream& s, Out y, In x, In bias) override;

  // ops/reduce.cu
  void sum(Stream& s, Out y, In x) override;
  void sumRows(Stream& s, InOut acc, In x) override;

  // ops/norm_forward.cu, ops/norm_backward.cu
  void rmsNormForward(Stream& s, Out y, Out rstd, OptOut sum, In x, OptIn residual, In w, double eps,
                      bool zeroCentered) override;
  void rmsNormBackwardInput(Stream& s, Out dx, In dy, In x, In w, In rstd, OptIn dResidual, bool zeroCentered) override;
  void rmsNormBackwardWeight(Stream& s, InOut dw, In dy, In x, In rstd) override;
  void layerNormForward(Stream& s, Out y, Out mean, Out rstd, In x, In w, OptIn bias, double eps,
                        bool zeroCentered) override;
  void layerNormBackwardInput(Stream& s, Out dx, In dy, In x, In w, In mean, In rstd, bool zeroCentered) override;
  void layerNormBackwardWeight(Stream& s, InOut dw, OptInOut dBias, In dy, In x, In mean, In rstd) override;

  // ops/rope.cu
  void rope(Stream& s, InOut x, In cos, In sin, In positions, bool interleaved, bool inverse) override;

  // ops/activation.cu
  void gatedActivationForward(Stream& s, Out y, In x, Activation kind) override;
  void gatedActivationBackward(Stream& s, Out dx, In dy, In x, Activation kind) override;
  void activationForward(Stream& s, Out y, In x, Activation kind) override;
  void activationBackward(Stream& s, Out dx, In dy, In x, Activation kind) override;

  // ops/random.cu
  void dropout(Stream& s, Out y, In x, In rng, In sampleIds, In positions, int64_t site, int64_t channelStart,
               double p) override;
  void randomNormal(Stream& s, Out y, int64_t seed, int64_t nameHash, Dims start, Dims logicalStride, double mean,
                    double std) override;

  // ops/routing.cu, ops/expert_rows.cu
  void routerForward(Stream& s, Out weights, Out experts, Out scores, In logits, OptIn bias, bool sigmoid,
                     bool normalize, int64_t groups, int64_t groupTopk, double scaling) override;
  void routerBackward(Stream& s, Out dLogits, OptIn dWeights, OptIn dScores, In experts, In scores, bool sigmoid,
                      bool normalize, double scaling) override;
  void balanceScores(Stream& s, Out dScores, Out losses, In scores, In counts, int64_t first, int64_t tokens,
                     double factor, bool normalize) override;
  void jitter(Stream& s, Out y, In x, In rng, In sampleIds, In positions, int64_t site, double eps) override;
  void capExperts(Stream& s, Out capped, In experts, OptIn weights, int64_t numExperts, int64_t capacity) override;
  void expertCounts(Stream& s, Out counts, In experts) override;
  void expertOrder(Stream& s, Out source, Out place, In experts, int64_t numExperts) override;
  void expertSlots(Stream& s, Out source, Out place, In experts, int64_t numExperts, int64_t capacity) override;
  void spreadRows(Stream& s, Out y, In x, In source, OptIn weights, int64_t K) override;
  void combineRows(Stream& s, Out y, In x, In place, OptIn weights, int64_t first) override;
  void combineRowsBackwardWeights(Stream& s, Out dWeights, In dy, In x, In place, int64_t first) override;

  // ops/embedding.cu
  void embeddingForward(Stream& s, Out y, In w, In ids, int64_t vocabStart) override;
  void embeddingBackward(Stream& s, InOut dw, In dy, In ids, int64_t vocabStart) override;

  // ops/cross_entropy.cu
  void crossEntropyStats(Stream& s, Out stats, In logits, In labels, int64_t vocabStart, int64_t vocabSize) override;
  void crossEntropyCombine(Stream& s, Out lse, Out loss, In stats, In labels) override;
  void crossEntropyBackward(Stream& s, Out dLogits, In logits, In lse, In labels, In dLoss, int64_t vocabStart,
                            int64_t vocabSize) override;

  // ops/sampling.cu
  void argmax(Stream& s, Out index, Out value, In logits, int64_t vocabStart, int64_t vocabSize) override;

  // ops/optimizer.cu
  void sumSquares(Stream& s, InOut acc, In x) override;
  void clipFactor(Stream& s, Out norm, Out factor, In acc, double maxNorm) override;
  void adamw(Stream& s, InOut param, InOut m, InOut v, OptOut model, In grad, In slots, double beta1, double beta2,
             double eps, double weightDecay) override;

  // matmul.cc; the product itself in matmul_cublaslt.cc, under emulation in emulation/matmul_host.cc
  void matmul(Stream& s, InOut y, In a, In b, OptIn bias, bool transA, bool transB, bool accumulate) override;
  void matmulRows(Stream& s, Out y, In a, In b, OptIn bias, bool transB, int64_t rows) override;
  void matmulActivation(Stream& s, Out y, OptOut pre, In a, In b, OptIn bias, Activation kind) override;

  // grouped_matmul.cc
  void groupedMatmul(Stream& s, Out y, In a, const std::vector<In>& b, const std::vector<int64_t>& counts,
                     bool transB) override;
  void groupedMatmulWeights(Stream& s, const std::vector<InOut>& acc, In dy, In x,
                            const std::vector<int64_t>& counts) override;

  // attention.cc; which engine computes it in attention_engine.h
  void attentionForward(Stream& s, Out out, Out lse, In q, In k, In v, OptIn firstKey, OptIn keyEnd, double scale,
                        bool causal, int64_t queryOffset, int64_t window, double softcap) override;
  void attentionBackward(Stream& s, Out dq, Out dk, Out dv, In dOut, In q, In k, In v, In out, In lse, OptIn firstKey,
                         OptIn keyEnd, double scale, bool causal, int64_t queryOffset, int64_t window,
                         double softcap) override;
  void mergeAttention(Stream& s, InOut out, InOut lse, In part, In partLse) override;
  void attentionSink(Stream& s, InOut out, InOut lse, In sink) override;
  void attentionSinkBackward(Stream& s, Out rows, In dOut, In out, In lse, In sink) override;

 private:
  bool settleAll();
  void multiplyGroup(const char* op, Stream& s, std::vector<MatmulArgs> products);
  void start(const char* op, Stream& s, const MatmulArgs& g);
  void multiply(Stream& s, InOut y, In a, In b, OptIn bias, bool transA, bool transB, bool accumulate,
                int64_t wholeRows);

  const DeviceOptions options_;
  Device device_;
  DeviceMemory pieces_;
  CachingAllocator allocator_;
  std::mutex mutex_;
  std::set<WorkerStream*> streams_;
};

/// Memory for the commands that are enqueued while this lives: what is enqueued later may be given it at once, because a
/// stream runs in order.
class Scratch {
 public:
  Scratch(Backend& backend, Stream& stream, size_t bytes)
      : backend_(backend), stream_(stream), data_(bytes == 0 ? nullptr : backend.allocate(bytes, stream)) {}
  ~Scratch() {
    if (data_ != nullptr) backend_.release(data_, stream_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  Backend& backend_;
  Stream& stream_;
  void* data_;
};

/// What an op takes, for supports(). A file of ops has one `const Support` at its end that lists its own.
enum class Takes { AnyType, Float, Float32 };
struct Support {
  Support(std::initializer_list<std::pair<const char*, Takes>> ops);
};

}  // namespace viaduct::cuda
