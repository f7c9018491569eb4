// Ranges of keys as cuDNN takes them, and what it leaves undefined there, made as attention's ops promise: kernels around its
// calls (ops/attention_ranges.cu).
#pragma once

#include "../attention_args.h"
#include "launch.cuh"

namespace viaduct::cuda {

/// For each entry n of a batch, of which each sample has `perSample`: its queries, and its keys, at least one.
void fillLengths(const AttentionArgs& a, int64_t perSample, int32_t* queries, int32_t* keys, const Launch& on);
/// First keys with `row` numbers from sample to sample, each no more than the number of keys.
void copyFirstKeys(const AttentionArgs& a, int64_t row, int32_t* packed, const Launch& on);
/// lse, packed, with so large a number for queries that see nothing that their probabilities become 0.
void copyStats(const AttentionArgs& a, float* packed, const Launch& on);
/// out and lse of queries that see nothing: zeros and -inf.
void clearUnseeing(const AttentionArgs& a, const Launch& on);
/// dq of queries that see nothing, dk and dv of keys behind the end: zeros.
void clearUnseenGradients(const AttentionArgs& a, const Launch& on);

}  // namespace viaduct::cuda
