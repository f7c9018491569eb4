// The ops attentionForward and attentionBackward; what computes them is behind attention_engine.h.
#include "attention.h"

#include "../checks/ops.h"
#include "attention_engine.h"
#include "cuda_backend.h"

namespace viaduct::cuda {

namespace {

void checkSizes(const char* op, const AttentionArgs& a, const TensorRef& q, const TensorRef& v) {
  VIADUCT_CHECK(a.D <= kMostChannels && a.Dv <= kMostChannels, "ERR_UNSUPPORTED", op,
                "expected heads of at most " + std::to_string(kMostChannels) + " channels on a GPU, got q " +
                    describe(q) + " and v " + describe(v));
  constexpr int64_t kMost = int64_t{1} << 30;
  VIADUCT_CHECK(
      a.S * a.R < kMost && a.K < kMost && a.B * a.G < kMost, "ERR_SHAPE", op,
      "expected fewer than 2^30 keys, and queries of a group, got q " + describe(q) + " and v " + describe(v));
}

}  // namespace

void CudaBackend::attentionForward(Stream& s, Out out, Out lse, In q, In k, In v, OptIn firstKey, OptIn keyEnd,
                                   double scale, bool causal, int64_t queryOffset, int64_t window, double softcap) {
  const char* op = "attentionForward";
  const AttentionArgs a =
      checkAttention(op, out, lse, q, k, v, firstKey, keyEnd, scale, causal, queryOffset, window, softcap);
  checkSizes(op, a, q, v);
  const Launch on(s);
  const AttentionChoice choice = chooseAttention(op, a, false, device_);
  const Scratch scratch(*this, s, choice.scratch);
  s.enqueue(op, [=, memory = scratch.as<void>()] { startChosen(choice, a, false, on, memory); });
}

void CudaBackend::attentionBackward(Stream& s, Out dq, Out dk, Out dv, In dOut, In q, In k, In v, In out, In lse,
                                    OptIn firstKey, OptIn keyEnd, double scale, bool causal, int64_t queryOffset,
                                    int64_t window, double softcap) {
  const char* op = "attentionBackward";
  AttentionArgs a =
      checkAttention(op, out, lse, q, k, v, firstKey, keyEnd, scale, causal, queryOffset, window, softcap);
  checkAttentionGradients(op, a, dq, dk, dv, dOut);
  checkSizes(op, a, q, v);
  checkSameDtype(op, "dOut", dOut, "q", q);
  checkSameDtype(op, "dq", dq, "q", q);
  checkSameDtype(op, "dk", dk, "q", q);
  checkSameDtype(op, "dv", dv, "q", q);
  const Launch on(s);
  const AttentionChoice choice = chooseAttention(op, a, true, device_);
  const Scratch scratch(*this, s, choice.scratch);
  s.enqueue(op, [=, memory = scratch.as<void>()] { startChosen(choice, a, true, on, memory); });
}

void CudaBackend::setAttentionEngine(const std::string& engine) { cuda::setAttentionEngine(engine); }
void CudaBackend::allowNondeterministic(bool allowed) { allowNondeterministicAttention(allowed); }

namespace {
const Support support{{"attentionForward", Takes::Float}, {"attentionBackward", Takes::Float}};
}

}  // namespace viaduct::cuda
