// One row per op of backend.h: the signature there is the signature in JavaScript, with the stream id first.
#include "bind.h"

namespace viaduct::binding {

std::vector<Row> opRows() {
  return {
      row("fill", &Backend::fill),
      row("copy", &Backend::copy),
      row("add", &Backend::add),
      row("mul", &Backend::mul),
      row("accumulate", &Backend::accumulate),
      row("scale", &Backend::scale),
      row("clamp", &Backend::clamp),
      row("clampBackward", &Backend::clampBackward),
      row("sum", &Backend::sum),
      row("sumRows", &Backend::sumRows),
      row("addBias", &Backend::addBias),
      row("matmul", &Backend::matmul),
      row("matmulRows", &Backend::matmulRows),
      row("groupedMatmul", &Backend::groupedMatmul),
      row("groupedMatmulWeights", &Backend::groupedMatmulWeights),
      row("rmsNormForward", &Backend::rmsNormForward),
      row("rmsNormBackwardInput", &Backend::rmsNormBackwardInput),
      row("rmsNormBackwardWeight", &Backend::rmsNormBackwardWeight),
      row("layerNormForward", &Backend::layerNormForward),
      row("layerNormBackwardInput", &Backend::layerNormBackwardInput),
      row("layerNormBackwardWeight", &Backend::layerNormBackwardWeight),
      row("rope", &Backend::rope),
      row("attentionForward", &Backend::attentionForward),
      row("attentionBackward", &Backend::attentionBackward),
      row("mergeAttention", &Backend::mergeAttention),
      row("gatedActivationForward", &Backend::gatedActivationForward),
      row("gatedActivationBackward", &Backend::gatedActivationBackward),
      row("activationForward", &Backend::activationForward),
      row("activationBackward", &Backend::activationBackward),
      row("routerForward", &Backend::routerForward),
      row("routerBackward", &Backend::routerBackward),
      row("expertCounts", &Backend::expertCounts),
      row("expertOrder", &Backend::expertOrder),
      row("spreadRows", &Backend::spreadRows),
      row("combineRows", &Backend::combineRows),
      row("combineRowsBackwardWeights", &Backend::combineRowsBackwardWeights),
      row("embeddingForward", &Backend::embeddingForward),
      row("embeddingBackward", &Backend::embeddingBackward),
      row("crossEntropyStats", &Backend::crossEntropyStats),
      row("crossEntropyCombine", &Backend::crossEntropyCombine),
      row("crossEntropyBackward", &Backend::crossEntropyBackward),
      row("sumSquares", &Backend::sumSquares),
      row("clipFactor", &Backend::clipFactor),
      row("adamw", &Backend::adamw),
      row("dropout", &Backend::dropout),
      row("randomNormal", &Backend::randomNormal),
      row("argmax", &Backend::argmax),
  };
}

}  // namespace viaduct::binding
