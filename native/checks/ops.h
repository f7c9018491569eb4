// What each op takes, checked on the caller's thread before anything is enqueued; the same for every device. One function an
// op, or a group of ops of one signature; meanings stand in backend.h. Each throws viaduct::Error as arguments.h does.
#pragma once

#include <vector>

#include "../attention_args.h"
#include "../backend.h"
#include "arguments.h"

namespace viaduct {

// ---- elementwise.cc
void checkCopy(const TensorRef& y, const TensorRef& x);
/// add, mul, clampBackward.
void checkBinary(const char* op, const TensorRef& y, const TensorRef& a, const TensorRef& b);
void checkAccumulate(const TensorRef& acc, const TensorRef& x);
/// clamp.
void checkUnary(const char* op, const TensorRef& y, const TensorRef& x);
void checkScale(const TensorRef& x, const TensorRef& factor);
void checkSum(const TensorRef& y, const TensorRef& x);
void checkSumRows(const TensorRef& acc, const TensorRef& x);
void checkAddBias(const TensorRef& y, const TensorRef& x, const TensorRef& bias);

// ---- matmul.cc
struct MatmulShape {
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
};
MatmulShape checkMatmul(const TensorRef& y, const TensorRef& a, const TensorRef& b, const TensorRef& bias, bool transA,
                        bool transB);
/// Products of fewer rows are not multiplied in pieces: their kernels depend on the number of rows.
constexpr int64_t kLeastSharedRows = 17;
/// y: some rows of a product of so many.
void checkMatmulRows(const TensorRef& y, int64_t rows);

/// Of matmulActivation, behind what matmul and activationForward check.
void checkMatmulActivation(const TensorRef& y, const TensorRef& pre, const TensorRef& a, Activation kind);

/// Of groupedMatmul and groupedMatmulWeights: as many counts as matrices, none negative, all rows counted.
void checkRowCounts(const char* op, const TensorRef& x, size_t matrices, const std::vector<int64_t>& counts);

// ---- routing.cc
void checkRouterForward(const TensorRef& weights, const TensorRef& experts, const TensorRef& scores,
                        const TensorRef& logits, const TensorRef& bias, int64_t groups, int64_t groupTopk);
void checkBalanceScores(const TensorRef& dScores, const TensorRef& losses, const TensorRef& scores,
                        const TensorRef& counts, int64_t first, int64_t tokens);
void checkRouterBackward(const TensorRef& dLogits, const TensorRef& dWeights, const TensorRef& dScores,
                         const TensorRef& experts, const TensorRef& scores);
void checkCapExperts(const TensorRef& capped, const TensorRef& experts, const TensorRef& weights, int64_t capacity);
void checkExpertCounts(const TensorRef& counts, const TensorRef& experts);
void checkExpertOrder(const TensorRef& source, const TensorRef& place, const TensorRef& experts, int64_t numExperts);
void checkExpertSlots(const TensorRef& source, const TensorRef& place, const TensorRef& experts, int64_t numExperts,
                      int64_t capacity);
void checkSpreadRows(const TensorRef& y, const TensorRef& x, const TensorRef& source, const TensorRef& weights,
                     int64_t K);
void checkCombineRows(const TensorRef& y, const TensorRef& x, const TensorRef& place, const TensorRef& weights);
void checkCombineRowsBackwardWeights(const TensorRef& dWeights, const TensorRef& dy, const TensorRef& x,
                                     const TensorRef& place);

// ---- embedding.cc
void checkEmbeddingForward(const TensorRef& y, const TensorRef& w, const TensorRef& ids);
void checkEmbeddingBackward(const TensorRef& dw, const TensorRef& dy, const TensorRef& ids);

// ---- logits.cc; those that read logits return how many columns of this shard are not padding
int64_t checkCrossEntropyStats(const TensorRef& stats, const TensorRef& logits, const TensorRef& labels,
                               int64_t vocabStart, int64_t vocabSize);
void checkCrossEntropyCombine(const TensorRef& lse, const TensorRef& loss, const TensorRef& stats,
                              const TensorRef& labels);
int64_t checkCrossEntropyBackward(const TensorRef& dLogits, const TensorRef& logits, const TensorRef& lse,
                                  const TensorRef& labels, const TensorRef& dLoss, int64_t vocabStart,
                                  int64_t vocabSize);
/// Whether dLoss is one number for all tokens, not one each.
inline bool isOneNumber(const TensorRef& dLoss) { return dLoss.ndim <= 1 && dLoss.numel() == 1; }
int64_t checkArgmax(const TensorRef& index, const TensorRef& value, const TensorRef& logits, int64_t vocabStart,
                    int64_t vocabSize);

// ---- optimizer.cc
void checkSumSquares(const TensorRef& acc, const TensorRef& x);
void checkClipFactor(const TensorRef& norm, const TensorRef& factor, const TensorRef& acc);
/// `model` may be absent.
void checkAdamw(const TensorRef& param, const TensorRef& m, const TensorRef& v, const TensorRef& model,
                const TensorRef& grad, const TensorRef& slots);

// ---- attention.cc
AttentionArgs checkAttention(const char* op, const TensorRef& out, const TensorRef& lse, const TensorRef& q,
                             const TensorRef& k, const TensorRef& v, const TensorRef& firstKey, const TensorRef& keyEnd,
                             double scale, bool causal, int64_t queryOffset, int64_t window, double softcap);
/// Fills in the gradients.
void checkAttentionGradients(const char* op, AttentionArgs& a, const TensorRef& dq, const TensorRef& dk,
                             const TensorRef& dv, const TensorRef& dOut);

AttentionSink checkAttentionSink(const char* op, const TensorRef& out, const TensorRef& lse, const TensorRef& sink);
AttentionSink checkAttentionSinkBackward(const TensorRef& rows, const TensorRef& dOut, const TensorRef& out,
                                         const TensorRef& lse, const TensorRef& sink);
AttentionMerge checkMergeAttention(const TensorRef& out, const TensorRef& lse, const TensorRef& part,
                                   const TensorRef& partLse);

// ---- norm.cc; what may be absent is optional in backend.h
void checkRmsNormForward(const TensorRef& y, const TensorRef& rstd, const TensorRef& sum, const TensorRef& x,
                         const TensorRef& residual, const TensorRef& w);
void checkRmsNormBackwardInput(const TensorRef& dx, const TensorRef& dy, const TensorRef& x, const TensorRef& w,
                               const TensorRef& rstd, const TensorRef& dResidual);
void checkRmsNormBackwardWeight(const TensorRef& dw, const TensorRef& dy, const TensorRef& x, const TensorRef& rstd);
void checkLayerNormForward(const TensorRef& y, const TensorRef& mean, const TensorRef& rstd, const TensorRef& x,
                           const TensorRef& w, const TensorRef& bias);
void checkLayerNormBackwardInput(const TensorRef& dx, const TensorRef& dy, const TensorRef& x, const TensorRef& w,
                                 const TensorRef& mean, const TensorRef& rstd);
void checkLayerNormBackwardWeight(const TensorRef& dw, const TensorRef& dBias, const TensorRef& dy, const TensorRef& x,
                                  const TensorRef& mean, const TensorRef& rstd);

// ---- rope.cc
/// Channels of a head that are rotated, at most.
constexpr int64_t kMaxRotated = 1024;
void checkRope(const TensorRef& x, const TensorRef& cos, const TensorRef& sin, const TensorRef& positions);

// ---- activation.cc
void checkGatedActivationForward(const TensorRef& y, const TensorRef& x, Activation kind);
void checkGatedActivationBackward(const TensorRef& dx, const TensorRef& dy, const TensorRef& x, Activation kind);
void checkActivationForward(const TensorRef& y, const TensorRef& x, Activation kind);
void checkActivationBackward(const TensorRef& dx, const TensorRef& dy, const TensorRef& x, Activation kind);

// ---- random.cc
void checkJitter(const TensorRef& y, const TensorRef& x, const TensorRef& rng, const TensorRef& sampleIds,
                 const TensorRef& positions, int64_t site, double eps);
void checkDropout(const TensorRef& y, const TensorRef& x, const TensorRef& rng, const TensorRef& sampleIds,
                  const TensorRef& positions, int64_t site, int64_t channelStart, double p);
void checkRandomNormal(const TensorRef& y, const Dims& start, const Dims& logicalStride);

}  // namespace viaduct
