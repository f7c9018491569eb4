// Attention's arguments on raw memory and which keys a query sees: what the CPU and a kernel must do alike. Filled by
// checkAttention (checks/ops.h).
#pragma once

#include <cstdint>

#include "half.h"
#include "tensor.h"

namespace viaduct {

/// Keys [lo, hi) that a query sees.
struct Visible {
  int64_t lo = 0;
  int64_t hi = 0;
};

/// One of q, k, v, ... with strides (elements) of batch, position, group and head in the group; channels are contiguous.
struct HeadsView {
  void* data = nullptr;
  DType dtype = DType::F32;
  int64_t batch = 0, position = 0, group = 0, head = 0;

  VIADUCT_HOST_DEVICE int64_t offset(int64_t b, int64_t s, int64_t g, int64_t r = 0) const {
    return b * batch + s * position + g * group + r * head;
  }
  /// Whether all rows begin a multiple of so many elements apart.
  bool evenly(int64_t elements) const {
    return batch % elements == 0 && position % elements == 0 && group % elements == 0 && head % elements == 0;
  }
  char* at(int64_t b, int64_t s, int64_t g, int64_t r = 0) const {
    return static_cast<char*>(data) + offset(b, s, g, r) * static_cast<int64_t>(dtypeBytes(dtype));
  }
  /// The same where the dtype is known to be T.
  template <typename T>
  VIADUCT_HOST_DEVICE T* row(int64_t b, int64_t s, int64_t g, int64_t r = 0) const {
    return static_cast<T*>(data) + offset(b, s, g, r);
  }
};

struct AttentionArgs {
  int64_t B = 0, S = 0, G = 0, R = 0, K = 0, D = 0, Dv = 0;
  HeadsView q, k, v, out;
  float* lse = nullptr;  // [B, G * R, S]
  int64_t lseBatch = 0, lseHead = 0, lseQuery = 0;
  const int32_t* firstKey = nullptr;
  int64_t firstKeyBatch = 0, firstKeyQuery = 0;
  const int32_t* keyEnd = nullptr;
  int64_t keyEndBatch = 0;
  float scale = 1, softcap = 0;
  bool causal = false;
  int64_t queryOffset = 0, window = 0;
  HeadsView dOut, dq, dk, dv;  // backward

  VIADUCT_HOST_DEVICE float* lseAt(int64_t b, int64_t g, int64_t r, int64_t i) const {
    return lse + b * lseBatch + (g * R + r) * lseHead + i * lseQuery;
  }

  /// The keys [lo, hi) that query i of sample b sees; lo >= hi when it sees none.
  VIADUCT_HOST_DEVICE Visible visible(int64_t b, int64_t i) const {
    Visible see{0, K};
    const int64_t at = queryOffset + i;
    if (causal && see.hi > at + 1) see.hi = at + 1;
    if (window > 0 && see.lo < at - window + 1) see.lo = at - window + 1;
    if (firstKey != nullptr) {
      const int64_t first = firstKey[b * firstKeyBatch + i * firstKeyQuery];
      if (see.lo < first) see.lo = first;
    }
    if (keyEnd != nullptr) {
      const int64_t end = keyEnd[b * keyEndBatch];
      if (see.hi > end) see.hi = end;
    }
    return see;
  }
};

/// Two attentions of the same queries that become one; rows are numbered b, i, g, r with r the fastest.
struct AttentionMerge {
  int64_t B = 0, S = 0, G = 0, R = 0, Dv = 0;
  HeadsView out, part;
  float *lse = nullptr, *partLse = nullptr;  // [B, G * R, S]

  struct Row {
    int64_t out, part, lse;  // offsets
  };
  VIADUCT_HOST_DEVICE int64_t count() const { return B * S * G * R; }
  VIADUCT_HOST_DEVICE Row row(int64_t n) const {
    const int64_t r = n % R, g = n / R % G, i = n / R / G % S, b = n / R / G / S;
    return {out.offset(b, i, g, r), part.offset(b, i, g, r), ((b * G + g) * R + r) * S + i};
  }
};

/// Attention whose softmax has one more term a head, a sink: exp(sink) joins the sum of exponentials and takes no value. Rows as of
/// AttentionMerge, whose `part` is the gradient of `out` in the backward pass.
struct AttentionSink : AttentionMerge {
  const void* sink = nullptr;  // [G * R]
  DType sinkDtype = DType::F32;
  float* rows = nullptr;  // [B * S, G * R]

  VIADUCT_HOST_DEVICE int64_t head(int64_t n) const { return n % (G * R); }
};

}  // namespace viaduct
