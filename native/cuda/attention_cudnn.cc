// Attention by cuDNN, opened at run time: graphs are described through cudnn-frontend's headers, and a plan is made once for
// each shape. The backward pass is cuDNN's deterministic one, unless the shape says that it need not be. Which calls come here is decided
// in attention_engine.cc; what tensor cores compute is not emulated: see emulation/attention_cudnn_host.cc.
#include <cudnn_frontend.h>

#include <map>
#include <mutex>
#include <unordered_map>

#include "attention_sdpa.h"
#include "cudnn_library.h"

namespace viaduct::cuda {

namespace {

namespace fe = cudnn_frontend;
namespace modifiers = fe::graph::attn::score_modifiers;
using Tensor = std::shared_ptr<fe::graph::Tensor_attributes>;

/// Names of a graph's tensors for a call.
enum Uid : int64_t { kQ = 1, kK, kV, kOut, kStats, kDOut, kDq, kDk, kDv, kQueryLengths, kKeyLengths, kFirstKeys };

void checkFrontend(fe::error_t error, const char* what) {
  VIADUCT_CHECK(error.is_good(), "ERR_UNSUPPORTED", "attention",
                std::string("cuDNN's ") + what + ": " + error.get_message());
}

void checkCudnn(cudnnStatus_t status, const char* what) {
  VIADUCT_CHECK(status == CUDNN_STATUS_SUCCESS, "ERR_NATIVE", "attention",
                std::string("expected ") + what + " to succeed, got \"" + cudnnGetErrorString(status) + "\"");
}

/// Handles of the process by GPU: one to make plans, one to run them. A handle serves one thread at a time.
struct Handles {
  std::mutex mutex;
  std::map<int, cudnnHandle_t> byGpu;

  /// With the lock held. The GPU is the thread's current one.
  cudnnHandle_t of(int gpu) {
    cudnnHandle_t& handle = byGpu[gpu];
    if (handle == nullptr) checkCudnn(cudnnCreate(&handle), "cudnnCreate");
    return handle;
  }
};

Handles& makers() {
  static auto* all = new Handles();  // never destroyed, because streams may run while the process exits
  return *all;
}

Handles& runners() {
  static auto* all = new Handles();
  return *all;
}

/// The graph of a shape: tensors, masks, and one operation of attention.
class Description {
 public:
  Description(const SdpaShape& shape, int computeCapability) : s_(shape), graph_(std::make_shared<fe::graph::Graph>()) {
    const fe::DataType_t dtype = s_.dtype == DType::BF16 ? fe::DataType_t::BFLOAT16 : fe::DataType_t::HALF;
    graph_->set_io_data_type(dtype)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT)
        .set_sm_version(computeCapability);  // before any operation: each takes it from the graph when it is added
    if (s_.softcap > 0) cap_ = graph_->tensor(s_.softcap);
    if (s_.lengths) {
      queryLengths_ = lengths("query_lengths", kQueryLengths);
      keyLengths_ = lengths("key_lengths", kKeyLengths);
    }
    if (s_.firstKeys >= 0) {
      const int64_t rows = s_.firstKeys > 0 ? s_.batch : 1, row = s_.firstKeys > 0 ? s_.firstKeys : s_.queries;
      firstKeys_ = input("first_keys", kFirstKeys, {rows, 1, s_.queries, 1}, {row, row, 1, 1});
      firstKeys_->set_data_type(fe::DataType_t::INT32);
    }
    s_.backward ? backward() : forward();
  }

  const std::shared_ptr<fe::graph::Graph>& graph() const { return graph_; }

 private:
  using Dims = std::vector<int64_t>;

  static Dims stridesOf(const SdpaStrides& x) { return {x.batch, x.head, x.position, 1}; }
  Dims queryDims(int64_t channels) const { return {s_.batch, s_.heads, s_.queries, channels}; }
  Dims keyDims(int64_t channels) const { return {s_.batch, s_.keyHeads, s_.keys, channels}; }
  Dims statsStrides() const { return {s_.heads * s_.queries, s_.queries, 1, 1}; }

  Tensor input(const char* name, Uid uid, const Dims& dims, const Dims& strides) {
    return graph_->tensor(fe::graph::Tensor_attributes().set_name(name).set_uid(uid).set_dim(dims).set_stride(strides));
  }
  Tensor lengths(const char* name, Uid uid) {
    Tensor tensor = input(name, uid, {s_.batch, 1, 1, 1}, {1, 1, 1, 1});
    tensor->set_data_type(fe::DataType_t::INT32);
    return tensor;
  }
  static void output(const Tensor& tensor, Uid uid, const Dims& dims, const Dims& strides) {
    tensor->set_output(true).set_uid(uid).set_dim(dims).set_stride(strides);
  }

  /// cuDNN takes masks as options, or all of them in one function of the scores.
  bool byFunction() const { return s_.softcap > 0 || s_.firstKeys >= 0; }

  /// Scores as the softmax sees them.
  Tensor modified(const std::shared_ptr<fe::graph::Graph>& graph, Tensor score) {
    if (s_.softcap > 0) score = softcap_.forward(graph, score, cap_);
    if (s_.firstKeys >= 0) score = fromFirstKeys(graph, score);
    if (!s_.causal && s_.window == 0) return score;
    return modifiers::sliding_window_mask(graph, score, alignment(), left(), right(), s_.queries, s_.keys, nullptr,
                                          nullptr);
  }

  /// Scores of keys before the first one, replaced by a number that no softmax notices. Not by -inf: whole tiles may be hidden
  /// before a query's first key, and their largest score must be a number that can be subtracted.
  Tensor fromFirstKeys(const std::shared_ptr<fe::graph::Graph>& graph, const Tensor& score) {
    const auto pointwise = [](const char* name, fe::PointwiseMode_t mode) {
      fe::graph::Pointwise_attributes attributes;
      attributes.set_name(name).set_mode(mode);
      return attributes;
    };
    const Tensor key = graph->pointwise(
        score,
        pointwise("key", fe::PointwiseMode_t::GEN_INDEX).set_axis(3).set_compute_data_type(fe::DataType_t::INT32));
    key->set_data_type(fe::DataType_t::INT32);
    const Tensor seen = graph->pointwise(
        key, firstKeys_, pointwise("seen", fe::PointwiseMode_t::CMP_GE).set_compute_data_type(fe::DataType_t::BOOLEAN));
    seen->set_data_type(fe::DataType_t::BOOLEAN);
    const auto hidden = std::make_shared<fe::graph::Tensor_attributes>(-1e30f);
    return graph->pointwise(score, hidden, seen, pointwise("hide", fe::PointwiseMode_t::BINARY_SELECT));
  }

  fe::DiagonalAlignment_t alignment() const {
    return s_.bottomRight ? fe::DiagonalAlignment_t::BOTTOM_RIGHT : fe::DiagonalAlignment_t::TOP_LEFT;
  }
  std::optional<int64_t> left() const { return s_.window > 0 ? std::optional<int64_t>(s_.window) : std::nullopt; }
  std::optional<int64_t> right() const { return s_.causal ? std::optional<int64_t>(0) : std::nullopt; }

  /// What both passes have in common.
  template <typename Attributes>
  Attributes options() {
    Attributes options;
    options.set_name("attention").set_attn_scale(s_.scale);
    if (byFunction()) {
      options.set_score_mod(
          [this](std::shared_ptr<fe::graph::Graph> graph, Tensor score) { return modified(graph, score); });
      return options;
    }
    if (s_.causal || s_.window > 0) options.set_diagonal_alignment(alignment());
    if (s_.causal) options.set_diagonal_band_right_bound(0);
    if (s_.window > 0) options.set_diagonal_band_left_bound(s_.window);
    if (s_.lengths) options.set_padding_mask(true).set_seq_len_q(queryLengths_).set_seq_len_kv(keyLengths_);
    return options;
  }

  void forward() {
    const Tensor q = input("q", kQ, queryDims(s_.channels), stridesOf(s_.q));
    const Tensor k = input("k", kK, keyDims(s_.channels), stridesOf(s_.k));
    const Tensor v = input("v", kV, keyDims(s_.valueChannels), stridesOf(s_.v));
    auto [out, stats] = graph_->sdpa(q, k, v, options<fe::graph::SDPA_attributes>().set_generate_stats(true));
    output(out, kOut, queryDims(s_.valueChannels), stridesOf(s_.out));
    output(stats, kStats, queryDims(1), statsStrides());
    stats->set_data_type(fe::DataType_t::FLOAT);
  }

  void backward() {
    const Tensor q = input("q", kQ, queryDims(s_.channels), stridesOf(s_.q));
    const Tensor k = input("k", kK, keyDims(s_.channels), stridesOf(s_.k));
    const Tensor v = input("v", kV, keyDims(s_.valueChannels), stridesOf(s_.v));
    const Tensor out = input("out", kOut, queryDims(s_.valueChannels), stridesOf(s_.out));
    const Tensor dOut = input("d_out", kDOut, queryDims(s_.valueChannels), stridesOf(s_.dOut));
    const Tensor stats = input("stats", kStats, queryDims(1), statsStrides());
    stats->set_data_type(fe::DataType_t::FLOAT);
    auto attributes = options<fe::graph::SDPA_backward_attributes>();
    attributes.set_deterministic_algorithm(s_.deterministic);
    if (s_.softcap > 0) {
      attributes.set_score_mod_bprop([this](std::shared_ptr<fe::graph::Graph> graph, Tensor gradient) {
        return softcap_.backward(graph, gradient, cap_);
      });
    }
    auto [dq, dk, dv] = graph_->sdpa_backward(q, k, v, out, dOut, stats, attributes);
    output(dq, kDq, queryDims(s_.channels), stridesOf(s_.dq));
    output(dk, kDk, keyDims(s_.channels), stridesOf(s_.dk));
    output(dv, kDv, keyDims(s_.valueChannels), stridesOf(s_.dv));
  }

  const SdpaShape& s_;
  std::shared_ptr<fe::graph::Graph> graph_;
  modifiers::Softcap softcap_;
  Tensor cap_, queryLengths_, keyLengths_, firstKeys_;
};

class CudnnPlan final : public SdpaPlan {
 public:
  CudnnPlan(const SdpaShape& shape, const SdpaTarget& target)
      : shape_(shape), gpu_(target.gpu), graph_(shape_, target.computeCapability) {
    fe::graph::Graph& graph = *graph_.graph();
    if (target.properties.empty()) {
      std::lock_guard<std::mutex> lock(makers().mutex);
      build(makers().of(gpu_));
    } else {
      auto properties = std::make_shared<fe::DeviceProperties>();
      checkFrontend(properties->deserialize({target.properties.begin(), target.properties.end()}), "properties");
      graph.set_device_properties(properties);
      build(nullptr);
    }
    int64_t bytes = 0;
    checkFrontend(graph.get_workspace_size(bytes), "workspace");
    workspace_ = static_cast<size_t>(bytes);
  }

  size_t workspace() const override { return workspace_; }

  void run(const SdpaData& data, cudaStream_t stream, void* workspace) const override {
    std::unordered_map<int64_t, void*> tensors{
        {kQ, data.q}, {kK, data.k}, {kV, data.v}, {kOut, data.out}, {kStats, data.stats}};
    if (shape_.backward) {
      tensors.insert({{kDOut, data.dOut}, {kDq, data.dq}, {kDk, data.dk}, {kDv, data.dv}});
    }
    if (shape_.lengths) tensors.insert({{kQueryLengths, data.queryLengths}, {kKeyLengths, data.keyLengths}});
    if (shape_.firstKeys >= 0) tensors.insert({kFirstKeys, data.firstKeys});
    std::lock_guard<std::mutex> lock(runners().mutex);
    const cudnnHandle_t handle = runners().of(gpu_);
    checkCudnn(cudnnSetStream(handle, stream), "cudnnSetStream");
    fe::error_t error = graph_.graph()->execute(handle, tensors, workspace);
    VIADUCT_CHECK(error.is_good(), "ERR_NATIVE", "attention",
                  "expected cuDNN's attention to start, got \"" + error.get_message() + "\"");
  }

 private:
  /// Without a handle for the GPU of the graph's device properties.
  void build(cudnnHandle_t handle) {
    fe::graph::Graph& graph = *graph_.graph();
    checkFrontend(graph.validate(), "rules");
    checkFrontend(handle == nullptr ? graph.build_operation_graph() : graph.build_operation_graph(handle), "graph");
    checkFrontend(graph.create_execution_plans({fe::HeurMode_t::A}), "engines");
    checkFrontend(graph.check_support(), "engines");
    checkFrontend(graph.build_plans(), "kernels");
  }

  const SdpaShape shape_;
  const int gpu_;
  Description graph_;  // refers to shape_
  size_t workspace_ = 0;
};

}  // namespace

std::unique_ptr<SdpaPlan> makeSdpaPlan(const SdpaShape& shape, const SdpaTarget& target) {
  openCudnn();
  try {
    return std::make_unique<CudnnPlan>(shape, target);
  } catch (const Error&) {
    throw;
  } catch (const std::exception& e) {
    throw Error("ERR_UNSUPPORTED", "attention", std::string("cuDNN's ") + e.what());
  }
}

std::string sdpaLibrary() {
  openCudnn();
  return cudnnName();
}

void sdpaOptions(const DeviceOptions& options) { cudnnOptions(options); }

}  // namespace viaduct::cuda
