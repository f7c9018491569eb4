// A mixture's products of experts on a GPU. Small ones in one launch, which cuBLAS has for matrices of one dtype; others a product
// each, on several streams beside each other, because one expert's product seldom fills the GPU.
#include <algorithm>
#include <array>
#include <atomic>
#include <vector>

#include "matmul.h"

namespace viaduct::cuda {

namespace {

enum class Engine { Auto, OneLaunch, Streams };
std::atomic<Engine> engine{Engine::Auto};

constexpr size_t kLanes = 4;
// What a GPU of 600 TFLOP/s computes while the host starts a kernel: 2 GFLOP in about 4 us. From the data sheet, not measured.
constexpr double kLaunchBound = 2e9;

bool inOneLaunch(const std::vector<MatmulArgs>& products) {
  if (products.size() < 2 || products[0].dtype != products[0].yDtype) return false;
  if (engine != Engine::Auto) return engine == Engine::OneLaunch;
  double flops = 0;
  for (const MatmulArgs& g : products) flops += 2.0 * static_cast<double>(g.shape.m * g.shape.n * g.shape.k);
  return flops / static_cast<double>(products.size()) < kLaunchBound;
}

/// Streams beside a CudaStream: they begin behind what it has, and it goes on behind what they have.
class Beside {
 public:
  Beside(CudaStream& stream, size_t lanes) : stream_(stream), lanes_(lanes), begun_(stream.device().event()) {
    if (lanes_ > 1) check(cudaEventRecord(begun_->get(), stream_.get()), "cudaEventRecord");
    for (size_t lane = 1; lane < lanes_; ++lane) check(cudaStreamWaitEvent(at(lane), begun_->get(), 0), "fork");
  }
  /// Lane 0 is the stream itself.
  cudaStream_t at(size_t lane) const { return lane == 0 ? stream_.get() : stream_.device().beside(lane - 1); }
  /// Also after an error: the stream's later work reuses memory that the lanes still read.
  void join() {
    for (size_t lane = 1; lane < lanes_; ++lane) {
      const auto ended = stream_.device().event();
      check(cudaEventRecord(ended->get(), at(lane)), "cudaEventRecord");
      check(cudaStreamWaitEvent(stream_.get(), ended->get(), 0), "join");
    }
  }

 private:
  CudaStream& stream_;
  const size_t lanes_;
  const std::shared_ptr<DeviceEvent> begun_;
};

void startEach(const std::vector<MatmulArgs>& products, CudaStream& stream, char* scratch, size_t bytes, size_t lanes) {
  Beside beside(stream, lanes);
  try {
    for (size_t e = 0; e < products.size(); ++e) {
      const size_t lane = e % lanes;
      startMatmul(products[e], {stream.device().ordinal(), beside.at(lane), scratch + lane * bytes, bytes}, nullptr);
    }
  } catch (...) {
    beside.join();
    throw;
  }
  beside.join();
}

/// The addresses of all b, then of all a, then of all y.
std::shared_ptr<const void> addresses(const std::vector<MatmulArgs>& products) {
  auto list = std::make_shared<std::vector<const void*>>();
  for (const MatmulArgs& g : products) list->push_back(g.b);
  for (const MatmulArgs& g : products) list->push_back(g.a);
  for (const MatmulArgs& g : products) list->push_back(g.y);
  return {list, list->data()};
}

}  // namespace

void CudaBackend::setGroupedMatmulEngine(const std::string& name) {
  constexpr std::array<std::pair<const char*, Engine>, 3> names{
      {{"auto", Engine::Auto}, {"one_launch", Engine::OneLaunch}, {"streams", Engine::Streams}}};
  const auto* found = std::find_if(names.begin(), names.end(), [&](const auto& each) { return name == each.first; });
  VIADUCT_CHECK(found != names.end(), "ERR_UNSUPPORTED", "groupedMatmul",
                "expected engine auto, one_launch or streams, got " + name + ": use one of these");
  engine = found->second;
}

void CudaBackend::multiplyGroup(const char* op, Stream& s, std::vector<MatmulArgs> products) {
  if (products.empty()) return;
  CudaStream& stream = cudaStream(s);
  const size_t bytes = matmulScratch();
  const size_t lanes = std::min(kLanes, products.size());
  const Scratch scratch(*this, s, lanes * bytes);
  const bool together = inOneLaunch(products);
  const Scratch pointers(*this, s, together ? 3 * products.size() * sizeof(void*) : 0);
  if (together) {
    Out list;
    list.data = pointers.as<void>();
    upload(s, list, addresses(products), 3 * products.size() * sizeof(void*));
  }
  s.enqueue(op, [products = std::move(products), &stream, memory = scratch.as<char>(), bytes, lanes, together,
                 list = pointers.as<void*>()] {
    const Lane whole{stream.device().ordinal(), stream.get(), memory, lanes * bytes};
    if (together && startGrouped(products, list, whole)) return;
    startEach(products, stream, memory, bytes, lanes);
  });
}

void CudaBackend::groupedMatmul(Stream& s, Out y, In a, const std::vector<In>& b, const std::vector<int64_t>& counts,
                                bool transB) {
  checkRowCounts("groupedMatmul", a, b.size(), counts);
  checkShape("groupedMatmul", "y", y, {a.dim(0), y.dim(-1)});
  if (a.dim(-1) == 0) return fill(s, y, 0);
  std::vector<MatmulArgs> products;
  int64_t first = 0;
  for (size_t e = 0; e < counts.size(); first += counts[e++]) {
    if (counts[e] == 0 || y.dim(-1) == 0) continue;
    products.push_back(productArgs(rowsOf<Out>(y, first, counts[e]), rowsOf<In>(a, first, counts[e]), b[e], OptIn(),
                                   false, transB, false, 0));
  }
  multiplyGroup("groupedMatmul", s, std::move(products));
}

void CudaBackend::groupedMatmulWeights(Stream& s, const std::vector<InOut>& acc, In dy, In x,
                                       const std::vector<int64_t>& counts) {
  checkRowCounts("groupedMatmulWeights", x, acc.size(), counts);
  checkShape("groupedMatmulWeights", "dy", dy, {x.dim(0), dy.dim(-1)});
  std::vector<MatmulArgs> products;
  int64_t first = 0;
  for (size_t e = 0; e < counts.size(); first += counts[e++]) {
    if (counts[e] == 0 || acc[e].dim(0) == 0 || acc[e].dim(1) == 0) continue;
    products.push_back(productArgs(acc[e], rowsOf<In>(dy, first, counts[e]), rowsOf<In>(x, first, counts[e]), OptIn(),
                                   true, false, true, 0));
  }
  multiplyGroup("groupedMatmulWeights", s, std::move(products));
}

namespace {
const Support support{{"groupedMatmul", Takes::Float}, {"groupedMatmulWeights", Takes::Float}};
}

}  // namespace viaduct::cuda
