// What the ops take that route tokens to experts.
#include <utility>

#include "ops.h"

namespace viaduct {

namespace {

void checkWhole(const char* op, const char* name, const TensorRef& x, DType dtype) {
  checkDtype(op, name, x, {dtype});
  checkContiguous(op, name, x);
}

/// [T, K], at most so many.
void checkChosen(const char* op, const char* name, const TensorRef& x, DType dtype) {
  checkWhole(op, name, x, dtype);
  checkNdim(op, name, x, 2);
  VIADUCT_CHECK(x.numel() < int64_t{1} << 31, "ERR_SHAPE", op,
                std::string("expected fewer than 2^31 rows, got ") + name + " " + describe(x) + ": cut the batch");
}

void checkWeights(const char* op, const TensorRef& weights, const TensorRef& place) {
  if (!weights.present()) return;
  checkWhole(op, "weights", weights, DType::F32);
  checkSameShape(op, "weights", weights, "place", place);
}

void checkRows(const char* op, const char* name, const TensorRef& x) {
  checkFloat(op, name, x);
  checkNdim(op, name, x, 2);
  checkRowStrided(op, name, x);
}

}  // namespace

void checkRouterForward(const TensorRef& weights, const TensorRef& experts, const TensorRef& scores,
                        const TensorRef& logits, const TensorRef& bias, int64_t groups, int64_t groupTopk) {
  const char* op = "routerForward";
  checkRows(op, "logits", logits);
  checkChosen(op, "experts", experts, DType::I32);
  checkWhole(op, "scores", scores, DType::F32);
  checkSameShape(op, "scores", scores, "logits", logits);
  checkWhole(op, "weights", weights, DType::F32);
  checkSameShape(op, "weights", weights, "experts", experts);
  const int64_t E = logits.dim(1), K = experts.dim(1);
  VIADUCT_CHECK(experts.dim(0) == logits.dim(0) && K >= 1 && K <= E, "ERR_SHAPE", op,
                "expected experts [T, K] of logits [T, E] with K from 1 to E, got " + describe(experts) + " of " +
                    describe(logits));
  if (bias.present()) {
    checkWhole(op, "bias", bias, DType::F32);
    checkShape(op, "bias", bias, {E});
  }
  VIADUCT_CHECK(groups >= 1 && E % groups == 0 && groupTopk >= 1 && groupTopk <= groups, "ERR_SHAPE", op,
                "expected groups that divide " + std::to_string(E) + " experts and of them at least one chosen, got " +
                    std::to_string(groups) + " and " + std::to_string(groupTopk));
  VIADUCT_CHECK(groups == 1 || (K % groupTopk == 0 && K <= groupTopk * (E / groups)), "ERR_SHAPE", op,
                "expected " + std::to_string(groupTopk) + " chosen groups to divide and to have " + std::to_string(K) +
                    " experts, got groups of " + std::to_string(E / groups));
}

void checkBalanceScores(const TensorRef& dScores, const TensorRef& losses, const TensorRef& scores,
                        const TensorRef& counts, int64_t first, int64_t tokens) {
  const char* op = "balanceScores";
  checkNdim(op, "scores", scores, 2);
  checkSameShape(op, "dScores", dScores, "scores", scores);
  checkShape(op, "losses", losses, {scores.dim(0)});
  checkNdim(op, "counts", counts, 2);
  checkShape(op, "counts", counts, {counts.dim(0), scores.dim(1)});
  for (const auto& [name, x] :
       {std::pair{"dScores", dScores}, {"losses", losses}, {"scores", scores}, {"counts", counts}}) {
    checkDtype(op, name, x, {DType::F32});
    checkContiguous(op, name, x);
  }
  VIADUCT_CHECK(counts.dim(0) >= 1 && tokens >= 1 && tokens % counts.dim(0) == 0 && first >= 0, "ERR_USAGE", op,
                "expected tokens in " + std::to_string(counts.dim(0)) + " equal runs from token 0 on, got " +
                    std::to_string(tokens) + " tokens, the first row token " + std::to_string(first));
}

void checkRouterBackward(const TensorRef& dLogits, const TensorRef& dWeights, const TensorRef& dScores,
                         const TensorRef& experts, const TensorRef& scores) {
  const char* op = "routerBackward";
  checkRows(op, "dLogits", dLogits);
  checkWhole(op, "scores", scores, DType::F32);
  checkSameShape(op, "scores", scores, "dLogits", dLogits);
  checkChosen(op, "experts", experts, DType::I32);
  checkShape(op, "experts", experts, {dLogits.dim(0), experts.dim(1)});
  checkWeights(op, dWeights, experts);
  if (dScores.present()) {
    checkWhole(op, "dScores", dScores, DType::F32);
    checkSameShape(op, "dScores", dScores, "scores", scores);
  }
}

void checkCapExperts(const TensorRef& capped, const TensorRef& experts, const TensorRef& weights, int64_t capacity) {
  const char* op = "capExperts";
  checkChosen(op, "experts", experts, DType::I32);
  checkChosen(op, "capped", capped, DType::I32);
  checkSameShape(op, "capped", capped, "experts", experts);
  checkWeights(op, weights, experts);
  VIADUCT_CHECK(capacity >= 0, "ERR_USAGE", op, "expected a capacity of at least 0, got " + std::to_string(capacity));
}

void checkExpertCounts(const TensorRef& counts, const TensorRef& experts) {
  const char* op = "expertCounts";
  checkChosen(op, "experts", experts, DType::I32);
  checkWhole(op, "counts", counts, DType::F32);
  checkNdim(op, "counts", counts, 2);
  VIADUCT_CHECK(
      counts.dim(0) >= 1 && experts.dim(0) % counts.dim(0) == 0, "ERR_SHAPE", op,
      "expected counts [R, E] with R that divides the tokens, got " + describe(counts) + " of " + describe(experts));
}

void checkExpertOrder(const TensorRef& source, const TensorRef& place, const TensorRef& experts, int64_t numExperts) {
  const char* op = "expertOrder";
  checkChosen(op, "experts", experts, DType::I32);
  checkWhole(op, "source", source, DType::I32);
  checkShape(op, "source", source, {experts.numel()});
  checkWhole(op, "place", place, DType::I32);
  checkSameShape(op, "place", place, "experts", experts);
  VIADUCT_CHECK(numExperts >= 1 && numExperts < int64_t{1} << 31, "ERR_SHAPE", op,
                "expected 1 to 2^31 experts, got " + std::to_string(numExperts));
}

void checkExpertSlots(const TensorRef& source, const TensorRef& place, const TensorRef& experts, int64_t numExperts,
                      int64_t capacity) {
  const char* op = "expertSlots";
  constexpr int64_t most = int64_t{1} << 31;
  checkChosen(op, "experts", experts, DType::I32);
  VIADUCT_CHECK(numExperts >= 1 && capacity >= 0 && numExperts < most && capacity < most / numExperts, "ERR_SHAPE", op,
                "expected at least 1 expert and fewer than 2^31 places, got " + std::to_string(numExperts) +
                    " experts with " + std::to_string(capacity) + " each");
  checkWhole(op, "source", source, DType::I32);
  checkShape(op, "source", source, {numExperts * capacity});
  checkWhole(op, "place", place, DType::I32);
  checkSameShape(op, "place", place, "experts", experts);
}

void checkSpreadRows(const TensorRef& y, const TensorRef& x, const TensorRef& source, const TensorRef& weights,
                     int64_t K) {
  const char* op = "spreadRows";
  checkRows(op, "x", x);
  checkWhole(op, "source", source, DType::I32);
  checkNdim(op, "source", source, 1);
  checkRows(op, "y", y);
  checkSameDtype(op, "y", y, "x", x);
  checkShape(op, "y", y, {source.dim(0), x.dim(1)});
  VIADUCT_CHECK(K >= 1, "ERR_SHAPE", op, "expected K of at least 1, got " + std::to_string(K));
  if (weights.present()) {
    checkWhole(op, "weights", weights, DType::F32);
    checkShape(op, "weights", weights, {x.dim(0), K});
  }
}

void checkCombineRows(const TensorRef& y, const TensorRef& x, const TensorRef& place, const TensorRef& weights) {
  const char* op = "combineRows";
  checkRows(op, "x", x);
  checkChosen(op, "place", place, DType::I32);
  checkRows(op, "y", y);
  checkSameDtype(op, "y", y, "x", x);
  checkShape(op, "y", y, {place.dim(0), x.dim(1)});
  checkWeights(op, weights, place);
}

void checkCombineRowsBackwardWeights(const TensorRef& dWeights, const TensorRef& dy, const TensorRef& x,
                                     const TensorRef& place) {
  const char* op = "combineRowsBackwardWeights";
  checkRows(op, "x", x);
  checkRows(op, "dy", dy);
  checkSameDtype(op, "dy", dy, "x", x);
  checkChosen(op, "place", place, DType::I32);
  checkShape(op, "dy", dy, {place.dim(0), x.dim(1)});
  checkWhole(op, "dWeights", dWeights, DType::F32);
  checkSameShape(op, "dWeights", dWeights, "place", place);
}

}  // namespace viaduct
