// Arguments of ops on logits: cross entropy and argmax.
#include <algorithm>

#include "ops.h"

namespace viaduct {

namespace {

void checkLogits(const char* op, const char* name, const TensorRef& logits) {
  checkFloat(op, name, logits);
  checkNdim(op, name, logits, 2);
  checkRowStrided(op, name, logits);
}

void checkLabels(const char* op, const TensorRef& labels, int64_t tokens) {
  checkIds(op, "labels", labels);
  checkShape(op, "labels", labels, {tokens});
  checkContiguous(op, "labels", labels);
}

void checkWhole(const char* op, const char* name, DType dtype, const TensorRef& t,
                std::initializer_list<int64_t> shape) {
  checkDtype(op, name, t, {dtype});
  checkShape(op, name, t, shape);
  checkContiguous(op, name, t);
}

int64_t validColumns(const TensorRef& logits, int64_t vocabStart, int64_t vocabSize) {
  return std::max<int64_t>(0, std::min(logits.dim(1), vocabSize - vocabStart));
}

}  // namespace

int64_t checkCrossEntropyStats(const TensorRef& stats, const TensorRef& logits, const TensorRef& labels,
                               int64_t vocabStart, int64_t vocabSize) {
  const char* op = "crossEntropyStats";
  checkLogits(op, "logits", logits);
  checkLabels(op, labels, logits.dim(0));
  checkWhole(op, "stats", DType::F32, stats, {3, logits.dim(0)});
  return validColumns(logits, vocabStart, vocabSize);
}

void checkCrossEntropyCombine(const TensorRef& lse, const TensorRef& loss, const TensorRef& stats,
                              const TensorRef& labels) {
  const char* op = "crossEntropyCombine";
  checkNdim(op, "stats", stats, 3);
  const int64_t shards = stats.dim(0), tokens = stats.dim(2);
  checkWhole(op, "stats", DType::F32, stats, {shards, 3, tokens});
  checkWhole(op, "lse", DType::F32, lse, {tokens});
  checkWhole(op, "loss", DType::F32, loss, {tokens});
  checkLabels(op, labels, tokens);
}

int64_t checkCrossEntropyBackward(const TensorRef& dLogits, const TensorRef& logits, const TensorRef& lse,
                                  const TensorRef& labels, const TensorRef& dLoss, int64_t vocabStart,
                                  int64_t vocabSize) {
  const char* op = "crossEntropyBackward";
  checkLogits(op, "logits", logits);
  checkLogits(op, "dLogits", dLogits);
  checkSameDtype(op, "dLogits", dLogits, "logits", logits);
  checkSameShape(op, "dLogits", dLogits, "logits", logits);
  const int64_t tokens = logits.dim(0);
  checkWhole(op, "lse", DType::F32, lse, {tokens});
  checkLabels(op, labels, tokens);
  if (!isOneNumber(dLoss)) checkWhole(op, "dLoss", DType::F32, dLoss, {tokens});
  checkDtype(op, "dLoss", dLoss, {DType::F32});
  return validColumns(logits, vocabStart, vocabSize);
}

int64_t checkArgmax(const TensorRef& index, const TensorRef& value, const TensorRef& logits, int64_t vocabStart,
                    int64_t vocabSize) {
  const char* op = "argmax";
  checkLogits(op, "logits", logits);
  checkWhole(op, "index", DType::I64, index, {logits.dim(0)});
  checkWhole(op, "value", DType::F32, value, {logits.dim(0)});
  return validColumns(logits, vocabStart, vocabSize);
}

}  // namespace viaduct
