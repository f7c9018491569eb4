// Arguments of attention.
#include <initializer_list>
#include <string>
#include <utility>

#include "ops.h"

namespace viaduct {

namespace {

// x [B, S, G, R, D] or [B, K, G, D].
HeadsView headsOf(const char* op, const char* name, const TensorRef& x, std::initializer_list<int64_t> shape) {
  checkShape(op, name, x, shape);
  checkFloat(op, name, x);
  checkRowStrided(op, name, x);
  HeadsView h;
  h.data = x.data;
  h.dtype = x.dtype;
  h.batch = x.stride[0];
  h.position = x.stride[1];
  h.group = x.stride[2];
  h.head = x.ndim == 5 ? x.stride[3] : 0;
  return h;
}

}  // namespace

AttentionArgs checkAttention(const char* op, const TensorRef& out, const TensorRef& lse, const TensorRef& q,
                             const TensorRef& k, const TensorRef& v, const TensorRef& firstKey, const TensorRef& keyEnd,
                             double scale, bool causal, int64_t queryOffset, int64_t window, double softcap) {
  checkNdim(op, "q", q, 5);
  checkNdim(op, "k", k, 4);
  checkNdim(op, "v", v, 4);
  AttentionArgs a;
  a.B = q.shape[0];
  a.S = q.shape[1];
  a.G = q.shape[2];
  a.R = q.shape[3];
  a.D = q.shape[4];
  a.K = k.shape[1];
  a.Dv = v.shape[3];
  VIADUCT_CHECK(
      a.D > 0 && a.Dv > 0, "ERR_SHAPE", op,
      "expected heads of at least 1 channel, got q " + describe(q) + " and v " + describe(v) + ": check the head size");
  a.q = headsOf(op, "q", q, {a.B, a.S, a.G, a.R, a.D});
  a.k = headsOf(op, "k", k, {a.B, a.K, a.G, a.D});
  a.v = headsOf(op, "v", v, {a.B, a.K, a.G, a.Dv});
  a.out = headsOf(op, "out", out, {a.B, a.S, a.G, a.R, a.Dv});
  checkSameDtype(op, "k", k, "q", q);
  checkSameDtype(op, "v", v, "q", q);
  checkSameDtype(op, "out", out, "q", q);
  checkShape(op, "lse", lse, {a.B, a.G * a.R, a.S});
  checkDtype(op, "lse", lse, {DType::F32});
  a.lse = lse.as<float>();
  a.lseBatch = lse.stride[0];
  a.lseHead = lse.stride[1];
  a.lseQuery = lse.stride[2];
  if (firstKey.present()) {
    checkShape(op, "firstKey", firstKey, {a.B, a.S});
    checkDtype(op, "firstKey", firstKey, {DType::I32});
    a.firstKey = firstKey.as<int32_t>();
    a.firstKeyBatch = firstKey.stride[0];
    a.firstKeyQuery = firstKey.stride[1];
  }
  if (keyEnd.present()) {
    checkShape(op, "keyEnd", keyEnd, {a.B});
    checkDtype(op, "keyEnd", keyEnd, {DType::I32});
    a.keyEnd = keyEnd.as<int32_t>();
    a.keyEndBatch = keyEnd.stride[0];
  }
  a.scale = static_cast<float>(scale);
  a.softcap = static_cast<float>(softcap);
  a.causal = causal;
  a.queryOffset = queryOffset;
  a.window = window;
  return a;
}

void checkAttentionGradients(const char* op, AttentionArgs& a, const TensorRef& dq, const TensorRef& dk,
                             const TensorRef& dv, const TensorRef& dOut) {
  a.dOut = headsOf(op, "dOut", dOut, {a.B, a.S, a.G, a.R, a.Dv});
  a.dq = headsOf(op, "dq", dq, {a.B, a.S, a.G, a.R, a.D});
  a.dk = headsOf(op, "dk", dk, {a.B, a.K, a.G, a.D});
  a.dv = headsOf(op, "dv", dv, {a.B, a.K, a.G, a.Dv});
}

namespace {

void checkLse(const char* op, const char* name, const TensorRef& lse, const AttentionMerge& m) {
  checkShape(op, name, lse, {m.B, m.G * m.R, m.S});
  checkDtype(op, name, lse, {DType::F32});
  checkContiguous(op, name, lse);
}

/// Results and their log-sum-exps.
void fillResults(const char* op, AttentionMerge& m, const TensorRef& out, const TensorRef& lse) {
  checkNdim(op, "out", out, 5);
  m.B = out.shape[0];
  m.S = out.shape[1];
  m.G = out.shape[2];
  m.R = out.shape[3];
  m.Dv = out.shape[4];
  m.out = headsOf(op, "out", out, {m.B, m.S, m.G, m.R, m.Dv});
  checkLse(op, "lse", lse, m);
  m.lse = lse.as<float>();
}

}  // namespace

AttentionMerge checkMergeAttention(const TensorRef& out, const TensorRef& lse, const TensorRef& part,
                                   const TensorRef& partLse) {
  const char* op = "mergeAttention";
  AttentionMerge m;
  fillResults(op, m, out, lse);
  checkDtype(op, "out", out, {DType::F32});
  m.part = headsOf(op, "part", part, {m.B, m.S, m.G, m.R, m.Dv});
  checkLse(op, "partLse", partLse, m);
  m.partLse = partLse.as<float>();
  return m;
}

AttentionSink checkAttentionSink(const char* op, const TensorRef& out, const TensorRef& lse, const TensorRef& sink) {
  AttentionSink a;
  fillResults(op, a, out, lse);
  checkShape(op, "sink", sink, {a.G * a.R});
  checkFloat(op, "sink", sink);
  checkContiguous(op, "sink", sink);
  a.sink = sink.data;
  a.sinkDtype = sink.dtype;
  return a;
}

AttentionSink checkAttentionSinkBackward(const TensorRef& rows, const TensorRef& dOut, const TensorRef& out,
                                         const TensorRef& lse, const TensorRef& sink) {
  const char* op = "attentionSinkBackward";
  AttentionSink a = checkAttentionSink(op, out, lse, sink);
  checkSameDtype(op, "dOut", dOut, "out", out);
  a.part = headsOf(op, "dOut", dOut, {a.B, a.S, a.G, a.R, a.Dv});
  checkShape(op, "rows", rows, {a.B * a.S, a.G * a.R});
  checkDtype(op, "rows", rows, {DType::F32});
  checkContiguous(op, "rows", rows);
  a.rows = rows.as<float>();
  return a;
}

}  // namespace viaduct
