// THE interface that a device implements: memory, streams and ops. Plain C++: no N-API, no CUDA header.
// An op checks shapes and dtypes at once and throws at once (ERR_SHAPE, ERR_DTYPE, ERR_UNSUPPORTED), then enqueues on the
// stream. The method's signature IS the signature of the JavaScript function: binding/ops.cc unpacks it by type deduction.
// "float" below means F32 or BF16; statistics, scalars ("slots") and main gradients are F32. Accumulation is always F32
// (F64 for norms); see the dtype table in docs/runtime.md. Unless a line says otherwise outputs do not alias inputs.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "errors.h"
#include "stream.h"
#include "tensor.h"

namespace viaduct {

enum class Activation : uint8_t { Silu = 0, Gelu = 1, GeluTanh = 2, Relu = 3, Relu2 = 4, QuickGelu = 5, Sigmoid = 6 };

struct MemoryStats {
  int64_t liveBytes = 0;      // handed out now
  int64_t peakBytes = 0;      // most ever handed out since resetPeak
  int64_t reservedBytes = 0;  // taken from the system
  int64_t liveBlocks = 0;
  int64_t limitBytes = 0;  // 0: no limit
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual const char* name() const = 0;
  /// One line for `doctor`: instruction set, matmul library, threads.
  virtual std::string describe() const = 0;

  // ---- memory: stream-ordered. A block freed on stream s may be handed out again to s at once; uses on other streams are
  // recorded by the slot table and waited for.
  virtual void* allocate(size_t bytes, Stream& stream) = 0;
  virtual void release(void* memory, Stream& stream) = 0;
  virtual MemoryStats memory() const = 0;
  virtual void resetPeak() = 0;
  virtual void setMemoryLimit(int64_t bytes) = 0;
  /// Waits for all streams and gives unused memory back to the system; returns the bytes given back.
  virtual int64_t trim() { return 0; }
  /// Blocking on the stream's thread; hostBytes lives until the command ran.
  virtual void upload(Stream& s, Out y, std::shared_ptr<const void> hostBytes, size_t bytes) = 0;
  virtual void download(Stream& s, std::shared_ptr<void> hostBytes, In x, size_t bytes) = 0;

  /// Whether the host's code may touch tensors' memory itself.
  virtual bool onHost() const { return true; }
  /// Copies `rows` rows of `width` bytes between the host and this device, off the streams: blocking, from any thread, after
  /// the caller has waited for the tensor's stream. Pitches are bytes from row to row.
  virtual void copyRows(void* to, size_t toPitch, const void* from, size_t fromPitch, size_t width, size_t rows,
                        bool toHost) {
    for (size_t i = 0; i < rows; ++i) {
      std::memcpy(static_cast<char*>(to) + i * toPitch, static_cast<const char*>(from) + i * fromPitch, width);
    }
  }

  /// y = x, in the order of `s`, a stream of this device: of the two, contiguous and alike, one lies in this device's memory and the
  /// other in the host backend's.
  virtual void copyBetween(Stream& s, Out y, In x, bool toHost) { copy(s, y, x); }

  virtual std::unique_ptr<Stream> createStream(int64_t id) = 0;
  virtual void setNumThreads(int64_t n) = 0;
  virtual int64_t numThreads() const = 0;
  /// Which matmul runs, where there is a choice: "auto", or on the CPU "builtin" or "onednn". Process-wide.
  virtual void setMatmulEngine(const std::string& engine) {
    VIADUCT_CHECK(engine == "auto", "ERR_UNSUPPORTED", name(),
                  "expected matmul engine auto, got " + engine + ": there is no other");
  }
  /// How a mixture's products of experts run, where there is a choice: "auto", or on NVIDIA GPUs "one_launch" or "streams".
  /// Process-wide.
  virtual void setGroupedMatmulEngine(const std::string& engine) {
    VIADUCT_CHECK(engine == "auto", "ERR_UNSUPPORTED", name(),
                  "expected engine auto of grouped products, got " + engine + ": there is no other");
  }
  /// Which attention runs, where there is a choice: "auto", or on NVIDIA GPUs "cudnn" or "own". Process-wide.
  virtual void setAttentionEngine(const std::string& engine) {
    VIADUCT_CHECK(engine == "auto", "ERR_UNSUPPORTED", name(),
                  "expected attention engine auto, got " + engine + ": there is no other");
  }
  /// Lets equal calls have unequal bits where that is faster; not so at first. Process-wide.
  virtual void allowNondeterministic(bool) {}

  /// Whether `op` (a method name below) runs for this dtype; with `why` filled when not.
  virtual bool supports(const std::string& op, DType dtype, std::string* why) const = 0;

#define VIADUCT_OP \
  { throw Error("ERR_UNSUPPORTED", name(), std::string(__func__) + " is not built for this device"); }

  // ---- data movement and elementwise (elementwise.cc)
  /// y[...] = value.
  virtual void fill(Stream& s, Out y, double value) VIADUCT_OP
  /// y = x, same shape, any strides. Casts float to float (round to nearest even) and int to int; equal dtypes copy bytes.
  virtual void copy(Stream& s, Out y, In x) VIADUCT_OP
  /// y = a + b; same shape and dtype, contiguous; y may be a or b.
  virtual void add(Stream& s, Out y, In a, In b) VIADUCT_OP
  /// y = a * b; as add.
  virtual void mul(Stream& s, Out y, In a, In b) VIADUCT_OP
  /// acc += x; acc F32, x float; contiguous.
  virtual void accumulate(Stream& s, InOut acc, In x) VIADUCT_OP
  /// x *= factor[0] (F32 slot); x float, contiguous.
  virtual void scale(Stream& s, InOut x, In factor) VIADUCT_OP
  /// y = x between low and high; a NaN stays. y may be x.
  virtual void clamp(Stream& s, Out y, In x, double low, double high) VIADUCT_OP
  /// dx = dy where x lies between low and high, both included, else 0. dx may be dy.
  virtual void clampBackward(Stream& s, Out dx, In dy, In x, double low, double high) VIADUCT_OP
  /// y[0] = sum of x (F32 out, F64 accumulation, ordered).
  virtual void sum(Stream& s, Out y, In x) VIADUCT_OP
  /// acc[N] += sum over rows of x[M,N]; acc F32. The gradient of a bias.
  virtual void sumRows(Stream& s, InOut acc, In x) VIADUCT_OP
  /// y[M,N] = x[M,N] + bias[N]; y may be x.
  virtual void addBias(Stream& s, Out y, In x, In bias) VIADUCT_OP

  // ---- matmul (matmul.cc)
  /// y[M,N] (+)= op(a) . op(b) (+ bias[N]); a is [M,K] or, transA, [K,M]; b is [K,N] or, transB, [N,K]. 2-D, row-strided.
  /// a, b float of one dtype; y that dtype or F32; `accumulate` adds to y (then y is F32, or a's dtype). Sums over K in F32.
  /// Cut into tiles by shape alone: bit-equal for every number of threads.
  virtual void matmul(Stream& s, InOut y, In a, In b, OptIn bias, bool transA, bool transB, bool accumulate) VIADUCT_OP
  /// Some rows of y[rows,N] = a . op(b) (+ bias[N]): y and a are these rows, two or more. The bits that `matmul` gives them
  /// among all, of which there are 17 or more.
  virtual void matmulRows(Stream& s, Out y, In a, In b, OptIn bias, bool transB, int64_t rows) VIADUCT_OP
  /// y[M,N] = act(a . b^T (+ bias)), b [N,K]; contiguous results of a's dtype. `pre` receives what the function is of. Where a
  /// product ends with the function, it is of the sum in F32, else of the sum as it is rounded to `pre`.
  virtual void matmulActivation(Stream& s, Out y, OptOut pre, In a, In b, OptIn bias, Activation kind) VIADUCT_OP

  /// Products of runs of rows, one matrix each: y[R,N] = a[R,K] . op(b[e]) for the counts[e] rows of expert e, expert after expert;
  /// op as of `matmul`. Every row belongs to an expert.
  virtual void groupedMatmul(Stream& s, Out y, In a, const std::vector<In>& b, const std::vector<int64_t>& counts,
                             bool transB) VIADUCT_OP
  /// acc[e] (F32) += dy^T . x over the counts[e] rows of expert e: the gradients of the matrices.
  virtual void groupedMatmulWeights(Stream& s, const std::vector<InOut>& acc, In dy, In x,
                                    const std::vector<int64_t>& counts) VIADUCT_OP

  // ---- normalisation (norm.cc); x [T,H] row-strided in T, w [H], statistics F32 [T]
  /// h = x (+ residual); y = h * rstd * (w + zeroCentered), rstd = 1/sqrt(mean(h^2)+eps). `sum` receives h when a residual is given.
  virtual void rmsNormForward(Stream& s, Out y, Out rstd, OptOut sum, In x, OptIn residual, In w, double eps,
                              bool zeroCentered) VIADUCT_OP
  /// dx = gradient of h (+ dResidual, the gradient that reaches h past the norm). dx may be dResidual.
  virtual void rmsNormBackwardInput(Stream& s, Out dx, In dy, In x, In w, In rstd, OptIn dResidual,
                                    bool zeroCentered) VIADUCT_OP
  /// dw[H] (F32) += sum over T of dy * x * rstd, ordered.
  virtual void rmsNormBackwardWeight(Stream& s, InOut dw, In dy, In x, In rstd) VIADUCT_OP
  virtual void layerNormForward(Stream& s, Out y, Out mean, Out rstd, In x, In w, OptIn bias, double eps,
                                bool zeroCentered) VIADUCT_OP
  virtual void layerNormBackwardInput(Stream& s, Out dx, In dy, In x, In w, In mean, In rstd,
                                      bool zeroCentered) VIADUCT_OP
  virtual void layerNormBackwardWeight(Stream& s, InOut dw, OptInOut dBias, In dy, In x, In mean, In rstd) VIADUCT_OP

  // ---- rotary embedding (rope.cc)
  /// In place. x [T, ..., D]: dim 0 token, last dim channel, heads between, any strides with the last contiguous.
  /// cos, sin F32 [P, R/2]; positions I32 [T], each < P. Rotates channels [0, R): halves (x[i], x[i+R/2]) or, interleaved,
  /// pairs (x[2i], x[2i+1]). `inverse` rotates back: the backward pass.
  virtual void rope(Stream& s, InOut x, In cos, In sin, In positions, bool interleaved, bool inverse) VIADUCT_OP

  // ---- attention (attention*.cc): grouped queries, online softmax, never S x S for long S
  /// q [B,S,G,R,D], k [B,K,G,D], v [B,K,G,Dv] (any strides, last contiguous); out [B,S,G,R,Dv]; lse F32 [B,G*R,S].
  /// Query i stands at key position queryOffset + i. Visible keys j: causal: j <= position; window > 0: j > position - window;
  /// firstKey I32 [B,S]: j >= firstKey[b,i] (left padding, packed sequences); keyEnd I32 [B]: j < keyEnd[b].
  /// A query that sees nothing gives zeros and lse = -inf. softcap > 0: score = softcap * tanh(score / softcap).
  virtual void attentionForward(Stream& s, Out out, Out lse, In q, In k, In v, OptIn firstKey, OptIn keyEnd,
                                double scale, bool causal, int64_t queryOffset, int64_t window,
                                double softcap) VIADUCT_OP
  /// dq, dk, dv have q's, k's and v's shape, any strides with the last contiguous; they are overwritten.
  virtual void attentionBackward(Stream& s, Out dq, Out dk, Out dv, In dOut, In q, In k, In v, In out, In lse,
                                 OptIn firstKey, OptIn keyEnd, double scale, bool causal, int64_t queryOffset,
                                 int64_t window, double softcap) VIADUCT_OP
  /// Attention to some keys and to others becomes attention to both. out F32 [B,S,G,R,Dv] and part (a float) of any strides
  /// with the last contiguous; lse, partLse F32 [B,G*R,S]. A row that saw nothing (zeros, lse -inf) weighs nothing.
  virtual void mergeAttention(Stream& s, InOut out, InOut lse, In part, In partLse) VIADUCT_OP
  /// Attention whose softmax counts one more score a head, `sink` [G*R] (a float), which takes no value: changes out (a float)
  /// [B,S,G,R,Dv] and lse F32 [B,G*R,S], strides as of mergeAttention. attentionBackward of these is that of queries, keys, values.
  virtual void attentionSink(Stream& s, InOut out, InOut lse, In sink) VIADUCT_OP
  /// rows F32 [B*S,G*R]: what each query adds to the gradient of `sink`; out and lse as attentionSink leaves them.
  virtual void attentionSinkBackward(Stream& s, Out rows, In dOut, In out, In lse, In sink) VIADUCT_OP

  // ---- activations (activation.cc), contiguous
  /// x [T,2F]: gate first, then up. y[T,F] = act(gate) * up.
  virtual void gatedActivationForward(Stream& s, Out y, In x, Activation kind) VIADUCT_OP
  /// dx [T,2F]; dx may be x.
  virtual void gatedActivationBackward(Stream& s, Out dx, In dy, In x, Activation kind) VIADUCT_OP
  virtual void activationForward(Stream& s, Out y, In x, Activation kind) VIADUCT_OP
  virtual void activationBackward(Stream& s, Out dx, In dy, In x, Activation kind) VIADUCT_OP

  // ---- routing of tokens to experts (routing.cc); K experts of E for each token
  /// logits [T,E]. scores F32 [T,E]: softmax of the row, or sigmoid of each. experts I32 [T,K]: those with the highest score + bias
  /// (F32 [E]), the highest first, the first on ties; a NaN counts as the lowest. With groups > 1 (neighbours, E / groups each) only
  /// of the groupTopk groups whose highest K / groupTopk sum up to most. weights F32 [T,K]: scores of the chosen, without bias, over
  /// their sum + 1e-20 where `normalize`, times scaling.
  virtual void routerForward(Stream& s, Out weights, Out experts, Out scores, In logits, OptIn bias, bool sigmoid,
                             bool normalize, int64_t groups, int64_t groupTopk, double scaling) VIADUCT_OP
  /// dLogits [T,E] from gradients of weights and of scores (F32 [T,E]), either may be absent.
  virtual void routerBackward(Stream& s, Out dLogits, OptIn dWeights, OptIn dScores, In experts, In scores,
                              bool sigmoid, bool normalize, double scaling) VIADUCT_OP
  /// A balance loss, by token: losses F32 [rows] and its gradient dScores F32 [rows,E], of scores F32 [rows,E] and counts
  /// F32 [R,E]: how often each of R equal runs of `tokens` tokens chose an expert. Row i is token first + i; rows past the
  /// last token get 0. losses[i] = factor * sum_e counts[run,e] * s[i,e], where s are the scores, or normalised ones: those
  /// over their sum.
  virtual void balanceScores(Stream& s, Out dScores, Out losses, In scores, In counts, int64_t first, int64_t tokens,
                             double factor, bool normalize) VIADUCT_OP
  /// y = x * (1 - eps + 2 eps u), u in [0, 1) drawn by place as dropout draws; x [T,C] contiguous. y may be x.
  virtual void jitter(Stream& s, Out y, In x, In rng, In sampleIds, In positions, int64_t site, double eps) VIADUCT_OP
  /// capped I32 [T,K]: the experts of [T,K], but numExperts for choices before which `capacity` choices of the same expert
  /// come: heavier ones, or as heavy and earlier; without weights F32 [T,K] earlier ones.
  virtual void capExperts(Stream& s, Out capped, In experts, OptIn weights, int64_t numExperts,
                          int64_t capacity) VIADUCT_OP
  /// counts F32 [R,E]: how often each expert is among experts I32 [T,K], of each of R runs of T / R tokens.
  virtual void expertCounts(Stream& s, Out counts, In experts) VIADUCT_OP
  /// The order of rows by expert, of an expert by token: source I32 [T*K]: which t * K + k stands there; place I32 [T,K]: where
  /// (t, k) stands. Experts are in [0, numExperts).
  virtual void expertOrder(Stream& s, Out source, Out place, In experts, int64_t numExperts) VIADUCT_OP
  /// The same with `capacity` places for each expert, E*C in all: source I32 [E*C] is -1 where no choice stands, place is E*C of choices
  /// that have none: those of no expert in [0, numExperts), and beyond the capacity.
  virtual void expertSlots(Stream& s, Out source, Out place, In experts, int64_t numExperts,
                           int64_t capacity) VIADUCT_OP
  /// y[i] = x[source[i] / K] (* weights[source[i]]): y [N,H], x [T,H], source I32 [N], weights F32 [T,K].
  virtual void spreadRows(Stream& s, Out y, In x, In source, OptIn weights, int64_t K) VIADUCT_OP
  /// y[t] = sum over k of (weights[t,k] *) x[place[t,k] - first], in F32; rows that x [N,H] does not have count as zeros.
  virtual void combineRows(Stream& s, Out y, In x, In place, OptIn weights, int64_t first) VIADUCT_OP
  /// dWeights F32 [T,K]: dy[t] . x[place[t,k] - first], 0 where x has no such row.
  virtual void combineRowsBackwardWeights(Stream& s, Out dWeights, In dy, In x, In place, int64_t first) VIADUCT_OP

  // ---- embedding (embedding.cc): w [V,H] is the shard that begins at row vocabStart; ids I32 or I64 [T]
  /// y[t] = w[ids[t] - vocabStart], zeros when outside the shard.
  virtual void embeddingForward(Stream& s, Out y, In w, In ids, int64_t vocabStart) VIADUCT_OP
  /// dw (F32) [V,H] += dy rows, in token order.
  virtual void embeddingBackward(Stream& s, InOut dw, In dy, In ids, int64_t vocabStart) VIADUCT_OP

  // ---- vocabulary-parallel cross entropy (cross_entropy.cc); labels I32 or I64 [T], -100 ignored
  /// logits [T,V] is the shard of columns [vocabStart, vocabStart+V); columns at or past vocabSize are padding (-inf).
  /// stats F32 [3,T]: max, sum of exp(logit - max), logit of the label (0 if not here).
  virtual void crossEntropyStats(Stream& s, Out stats, In logits, In labels, int64_t vocabStart,
                                 int64_t vocabSize) VIADUCT_OP
  /// stats F32 [P,3,T] of all P shards, in rank order -> lse F32 [T], loss F32 [T] (0 where ignored).
  virtual void crossEntropyCombine(Stream& s, Out lse, Out loss, In stats, In labels) VIADUCT_OP
  /// dLogits[t,:] = (softmax - onehot) * dLoss[t], 0 where ignored or padded. dLoss F32 [T] or [1]. dLogits may be logits.
  virtual void crossEntropyBackward(Stream& s, Out dLogits, In logits, In lse, In labels, In dLoss, int64_t vocabStart,
                                    int64_t vocabSize) VIADUCT_OP

  // ---- optimizer (optimizer.cc); F32 contiguous
  /// acc F64 [1] += sum of x^2, ordered. Not finite in, not finite out.
  virtual void sumSquares(Stream& s, InOut acc, In x) VIADUCT_OP
  /// norm[0] = sqrt(acc[0]); factor[0] = min(1, maxNorm / (norm + 1e-6)), 1 if maxNorm <= 0 (as torch's clip_grad_norm_).
  virtual void clipFactor(Stream& s, Out norm, Out factor, In acc, double maxNorm) VIADUCT_OP
  /// AdamW as torch's single-tensor form. param, m, v, grad F32; `model` (BF16 or F16 copy of param) is rewritten when present.
  /// slots F32 [4]: lr, 1 - beta1^t, 1 - beta2^t, factor of the gradient. Decoupled decay: param *= 1 - lr * weightDecay.
  virtual void adamw(Stream& s, InOut param, InOut m, InOut v, OptOut model, In grad, In slots, double beta1,
                     double beta2, double eps, double weightDecay) VIADUCT_OP

  // ---- randomness (random.cc): Philox 4x32-10, counters by place
  /// y = x * mask / (1-p); x, y [T,C] contiguous, y may be x. Element (t,c) draws from the counter
  /// (sampleIds[t], positions[t], site, channelStart + c) under key rng I64 [2] = (seed, step). The same call on dy is the backward.
  virtual void dropout(Stream& s, Out y, In x, In rng, In sampleIds, In positions, int64_t site, int64_t channelStart,
                       double p) VIADUCT_OP
  /// Normal numbers by logical place: element with index i of y gets the draw of linear logical index
  /// sum_d (start[d] + i[d]) * logicalStride[d] under key (seed, nameHash). Any strides.
  virtual void randomNormal(Stream& s, Out y, int64_t seed, int64_t nameHash, Dims start, Dims logicalStride,
                            double mean, double std) VIADUCT_OP

  // ---- sampling (sampling.cc)
  /// index I64 [T] of the largest of logits[t, 0..vocabSize), the first on ties; value F32 [T]. vocabStart is added to the index.
  virtual void argmax(Stream& s, Out index, Out value, In logits, int64_t vocabStart, int64_t vocabSize) VIADUCT_OP

#undef VIADUCT_OP
};

/// The CPU backend of this process. The CUDA plug-in gives another through dlopen.
std::unique_ptr<Backend> createCpuBackend();

}  // namespace viaduct
