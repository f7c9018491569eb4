// The ops attentionForward and attentionBackward; the arithmetic stands in attention_forward.cc and attention_backward.cc.
#include "attention.h"

#include "../checks/ops.h"
#include "cpu_backend.h"

namespace viaduct::cpu {

void CpuBackend::attentionForward(Stream& s, Out out, Out lse, In q, In k, In v, OptIn firstKey, OptIn keyEnd,
                                  double scale, bool causal, int64_t queryOffset, int64_t window, double softcap) {
  const char* op = "attentionForward";
  const AttentionArgs a =
      checkAttention(op, out, lse, q, k, v, firstKey, keyEnd, scale, causal, queryOffset, window, softcap);
  s.enqueue(op, [a] { runAttentionForward(a); });
}

void CpuBackend::attentionBackward(Stream& s, Out dq, Out dk, Out dv, In dOut, In q, In k, In v, In out, In lse,
                                   OptIn firstKey, OptIn keyEnd, double scale, bool causal, int64_t queryOffset,
                                   int64_t window, double softcap) {
  const char* op = "attentionBackward";
  AttentionArgs a =
      checkAttention(op, out, lse, q, k, v, firstKey, keyEnd, scale, causal, queryOffset, window, softcap);
  checkAttentionGradients(op, a, dq, dk, dv, dOut);
  s.enqueue(op, [a] { runAttentionBackward(a); });
}

}  // namespace viaduct::cpu
