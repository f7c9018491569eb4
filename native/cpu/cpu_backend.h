// The CPU's Backend: which op runs here, file by file. Meaning, shapes and dtypes of each op stand in ../backend.h; memory and
// streams live in cpu_backend.cc, each group of ops in the file that its comment names.
#pragma once

#include <memory>
#include <string>

#include "../backend.h"

namespace viaduct::cpu {

class CpuBackend final : public Backend {
 public:
  // cpu_backend.cc
  CpuBackend();
  ~CpuBackend() override;
  const char* name() const override { return "cpu"; }
  std::string describe() const override;
  void* allocate(size_t bytes, Stream& stream) override;
  void release(void* memory, Stream& stream) override;
  MemoryStats memory() const override;
  void resetPeak() override;
  void setMemoryLimit(int64_t bytes) override;
  int64_t trim() override;
  void upload(Stream& s, Out y, std::shared_ptr<const void> hostBytes, size_t bytes) override;
  void download(Stream& s, std::shared_ptr<void> hostBytes, In x, size_t bytes) override;
  std::unique_ptr<Stream> createStream(int64_t id) override;
  void setNumThreads(int64_t n) override;
  int64_t numThreads() const override;
  bool supports(const std::string& op, DType dtype, std::string* why) const override;

  // elementwise.cc
  void fill(Stream& s, Out y, double value) override;
  void copy(Stream& s, Out y, In x) override;
  void add(Stream& s, Out y, In a, In b) override;
  void mul(Stream& s, Out y, In a, In b) override;
  void accumulate(Stream& s, InOut acc, In x) override;
  void scale(Stream& s, InOut x, In factor) override;
  void clamp(Stream& s, Out y, In x, double low, double high) override;
  void clampBackward(Stream& s, Out dx, In dy, In x, double low, double high) override;
  void sum(Stream& s, Out y, In x) override;
  void sumRows(Stream& s, InOut acc, In x) override;
  void addBias(Stream& s, Out y, In x, In bias) override;

  // matmul.cc
  void setMatmulEngine(const std::string& engine) override;
  void matmul(Stream& s, InOut y, In a, In b, OptIn bias, bool transA, bool transB, bool accumulate) override;
  void matmulRows(Stream& s, Out y, In a, In b, OptIn bias, bool transB, int64_t rows) override;
  void matmulActivation(Stream& s, Out y, OptOut pre, In a, In b, OptIn bias, Activation kind) override;

  // grouped_matmul.cc
  void groupedMatmul(Stream& s, Out y, In a, const std::vector<In>& b, const std::vector<int64_t>& counts,
                     bool transB) override;
  void groupedMatmulWeights(Stream& s, const std::vector<InOut>& acc, In dy, In x,
                            const std::vector<int64_t>& counts) override;

  // norm.cc
  void rmsNormForward(Stream& s, Out y, Out rstd, OptOut sum, In x, OptIn residual, In w, double eps,
                      bool zeroCentered) override;
  void rmsNormBackwardInput(Stream& s, Out dx, In dy, In x, In w, In rstd, OptIn dResidual, bool zeroCentered) override;
  void rmsNormBackwardWeight(Stream& s, InOut dw, In dy, In x, In rstd) override;
  void layerNormForward(Stream& s, Out y, Out mean, Out rstd, In x, In w, OptIn bias, double eps,
                        bool zeroCentered) override;
  void layerNormBackwardInput(Stream& s, Out dx, In dy, In x, In w, In mean, In rstd, bool zeroCentered) override;
  void layerNormBackwardWeight(Stream& s, InOut dw, OptInOut dBias, In dy, In x, In mean, In rstd) override;

  // rope.cc
  void rope(Stream& s, InOut x, In cos, In sin, In positions, bool interleaved, bool inverse) override;

  // attention.cc
  void attentionForward(Stream& s, Out out, Out lse, In q, In k, In v, OptIn firstKey, OptIn keyEnd, double scale,
                        bool causal, int64_t queryOffset, int64_t window, double softcap) override;
  void attentionBackward(Stream& s, Out dq, Out dk, Out dv, In dOut, In q, In k, In v, In out, In lse, OptIn firstKey,
                         OptIn keyEnd, double scale, bool causal, int64_t queryOffset, int64_t window,
                         double softcap) override;
  void mergeAttention(Stream& s, InOut out, InOut lse, In part, In partLse) override;
  void attentionSink(Stream& s, InOut out, InOut lse, In sink) override;
  void attentionSinkBackward(Stream& s, Out rows, In dOut, In out, In lse, In sink) override;

  // activation.cc
  void gatedActivationForward(Stream& s, Out y, In x, Activation kind) override;
  void gatedActivationBackward(Stream& s, Out dx, In dy, In x, Activation kind) override;
  void activationForward(Stream& s, Out y, In x, Activation kind) override;
  void activationBackward(Stream& s, Out dx, In dy, In x, Activation kind) override;

  // routing.cc, expert_rows.cc
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

  // embedding.cc
  void embeddingForward(Stream& s, Out y, In w, In ids, int64_t vocabStart) override;
  void embeddingBackward(Stream& s, InOut dw, In dy, In ids, int64_t vocabStart) override;

  // cross_entropy.cc
  void crossEntropyStats(Stream& s, Out stats, In logits, In labels, int64_t vocabStart, int64_t vocabSize) override;
  void crossEntropyCombine(Stream& s, Out lse, Out loss, In stats, In labels) override;
  void crossEntropyBackward(Stream& s, Out dLogits, In logits, In lse, In labels, In dLoss, int64_t vocabStart,
                            int64_t vocabSize) override;

  // optimizer.cc
  void sumSquares(Stream& s, InOut acc, In x) override;
  void clipFactor(Stream& s, Out norm, Out factor, In acc, double maxNorm) override;
  void adamw(Stream& s, InOut param, InOut m, InOut v, OptOut model, In grad, In slots, double beta1, double beta2,
             double eps, double weightDecay) override;

  // random.cc
  void dropout(Stream& s, Out y, In x, In rng, In sampleIds, In positions, int64_t site, int64_t channelStart,
               double p) override;
  void randomNormal(Stream& s, Out y, int64_t seed, int64_t nameHash, Dims start, Dims logicalStride, double mean,
                    double std) override;

  // sampling.cc
  void argmax(Stream& s, Out index, Out value, In logits, int64_t vocabStart, int64_t vocabSize) override;

 private:
  struct Memory;  // the arena; defined in cpu_backend.cc
  std::unique_ptr<Memory> arena_;
};

}  // namespace viaduct::cpu
