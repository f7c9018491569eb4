// Lookup of embedding rows and its gradient. The gradient sorts tokens by row, stably, and adds up each row's tokens in token
// order in one thread a column: the CPU's bits, with no atomics on floats.
#include "../../checks/ops.h"
#include "../../ids.h"
#include "../cuda_backend.h"
#include "../launch.cuh"
#include "../numbers.cuh"
#include "../sort.h"

namespace viaduct::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 8;  // rows of the gradient that are on their way at a time

/// y[t] = w[ids[t] - vocabStart] or zeros, a block a token. Strides and columns count units.
template <typename U>
__global__ void __launch_bounds__(kThreads) lookupKernel(U* y, const U* w, Ids ids, int64_t yStride, int64_t wStride,
                                                         int64_t columns, int64_t vocabStart, int64_t rows) {
  const int64_t row = ids[blockIdx.x] - vocabStart;
  const bool here = row >= 0 && row < rows;
  U* out = y + blockIdx.x * yStride;
  const U* in = w + (here ? row : 0) * wStride;
#pragma unroll 4
  for (int64_t c = threadIdx.x; c < columns; c += kThreads) out[c] = here ? in[c] : U{};
}

template <typename U>
void startLookup(const Launch& on, const TensorRef& y, const TensorRef& w, const TensorRef& ids, int64_t vocabStart) {
  const auto units = [&](int64_t elements) {
    return elements * static_cast<int64_t>(dtypeBytes(w.dtype)) / static_cast<int64_t>(sizeof(U));
  };
  on(lookupKernel<U>, static_cast<unsigned>(ids.dim(0)), kThreads, y.as<U>(), w.as<U>(), Ids(ids), units(y.stride[0]),
     units(w.stride[0]), units(w.dim(1)), vocabStart, w.dim(0));
}

/// items[t] = (row of token t, t); the row after the last one where the shard has none.
__global__ void __launch_bounds__(kThreads)
    rowsOfTokensKernel(Keyed* items, Ids ids, int64_t tokens, int64_t vocabStart, int64_t rows) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= tokens) return;
  const int64_t row = ids[t] - vocabStart;
  items[t] = {static_cast<uint32_t>(row >= 0 && row < rows ? row : rows), static_cast<uint32_t>(t)};
}

/// The first item behind `first` with another key.
__device__ int64_t endOfRun(const Keyed* items, int64_t n, int64_t first) {
  const uint32_t key = items[first].key;
  int64_t last = first, step = 1;
  while (last + step < n && items[last + step].key == key) {
    last += step;
    step *= 2;
  }
  int64_t end = min(last + step, n);
  while (end - last > 1) {
    const int64_t middle = last + (end - last) / 2;
    (items[middle].key == key ? last : end) = middle;
  }
  return end;
}

/// A block takes the run of tokens of one row, the one that begins at its item, if one does.
template <int W, typename T>
__global__ void __launch_bounds__(kThreads)
    addRowsKernel(float* dw, const T* dy, const Keyed* items, int64_t dwStride, int64_t dyStride, int64_t columns,
                  int64_t tokens, int64_t rows) {
  const int64_t first = blockIdx.x, row = items[first].key;
  if (row >= rows || (first > 0 && items[first - 1].key == row)) return;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * W;
  if (column >= columns) return;
  const int64_t end = endOfRun(items, tokens, first);
  auto* out = reinterpret_cast<Pack<float, W>*>(dw + row * dwStride + column);
  Pack<float, W> total = *out;
  const auto gradient = [=](int64_t i) {
    return *reinterpret_cast<const Pack<T, W>*>(dy + items[i].value * dyStride + column);
  };
  const auto add = [&](Pack<T, W> row) {
    float v[W];
    widenAll(row, v);
#pragma unroll
    for (int k = 0; k < W; ++k) total.at[k] += v[k];
  };
  int64_t i = first;
  for (; i + kBatch <= end; i += kBatch) {
    Pack<T, W> batch[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) batch[b] = gradient(i + b);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) add(batch[b]);
  }
  for (; i < end; ++i) add(gradient(i));
  *out = total;
}

template <int W, typename T>
void startAddRows(const Launch& on, const TensorRef& dw, const TensorRef& dy, const Keyed* items) {
  const int64_t columns = dw.dim(1), strips = (columns + kThreads * W - 1) / (kThreads * W);
  on(addRowsKernel<W, T>, dim3(static_cast<unsigned>(dy.dim(0)), static_cast<unsigned>(strips)), kThreads,
     dw.as<float>(), dy.as<T>(), items, dw.stride[0], dy.stride[0], columns, dy.dim(0), dw.dim(0));
}

}  // namespace

void CudaBackend::embeddingForward(Stream& s, Out y, In w, In ids, int64_t vocabStart) {
  checkEmbeddingForward(y, w, ids);
  const Launch on(s);
  s.enqueue("embeddingForward", [=] {
    const int64_t perPack = 16 / static_cast<int64_t>(dtypeBytes(w.dtype));
    const bool packs = packable(y.as<char>(), w.as<char>()) && w.dim(1) % perPack == 0 && w.stride[0] % perPack == 0 &&
                       y.stride[0] % perPack == 0;
    if (packs) {
      startLookup<uint4>(on, y, w, ids, vocabStart);
    } else if (w.dtype == DType::F32) {
      startLookup<uint32_t>(on, y, w, ids, vocabStart);
    } else {
      startLookup<uint16_t>(on, y, w, ids, vocabStart);
    }
  });
}

void CudaBackend::embeddingBackward(Stream& s, InOut dw, In dy, In ids, int64_t vocabStart) {
  checkEmbeddingBackward(dw, dy, ids);
  const int64_t tokens = ids.dim(0), rows = dw.dim(0);
  VIADUCT_CHECK(std::max(tokens, rows) < int64_t{1} << 31, "ERR_UNSUPPORTED", "embeddingBackward",
                "expected fewer than 2^31 tokens and rows, got " + std::to_string(tokens) + " and " +
                    std::to_string(rows) + ": cut the batch or shard the vocabulary");
  if (dy.numel() == 0 || rows == 0) return;
  const Scratch items(*this, s, static_cast<size_t>(tokens) * sizeof(Keyed));
  const Scratch work(*this, s, sortBytes(tokens));
  const Launch on(s);
  s.enqueue("embeddingBackward", [=, items = items.as<Keyed>(), work = work.as<void>()] {
    on(rowsOfTokensKernel, static_cast<unsigned>((tokens + kThreads - 1) / kThreads), kThreads, items, Ids(ids), tokens,
       vocabStart, rows);
    const Keyed* sorted = stableSort(on, items, tokens, static_cast<uint32_t>(rows), work);
    dispatchFloat(dy.dtype, [&](auto zero) {
      using T = decltype(zero);
      constexpr int kPack = kPackOf<float, T>;
      if (packable(dw.as<float>(), dy.as<T>()) && dw.dim(1) % kPack == 0 && dw.stride[0] % kPack == 0 &&
          dy.stride[0] % kPack == 0) {
        startAddRows<kPack, T>(on, dw, dy, sorted);
      } else {
        startAddRows<1, T>(on, dw, dy, sorted);
      }
    });
  });
}

namespace {
const Support support{{"embeddingForward", Takes::Float}, {"embeddingBackward", Takes::Float}};
}

}  // namespace viaduct::cuda
