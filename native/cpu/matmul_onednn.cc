// Tiles through oneDNN, one thread each. F32 through its sgemm; BF16 through its matmul primitive, which exists from
// AVX-512 on. Nothing here chooses an engine or a tile.
#include "matmul.h"

#ifdef VIADUCT_HAVE_ONEDNN

#include <omp.h>

#include <array>
#include <map>

#include "oneapi/dnnl/dnnl.hpp"

namespace viaduct::cpu::onednn {

namespace {

// oneDNN takes one thread inside a parallel region, and the calling thread's own setting outside of one.
void useOneThread() {
  if (!omp_in_parallel() && omp_get_max_threads() != 1) omp_set_num_threads(1);
}

dnnl::engine& cpuEngine() {
  static dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

using Desc = dnnl::memory::desc;
// m, n, k, strides of a (2), of b (2), ldc, add.
using Key = std::array<int64_t, 9>;
struct Plan {
  Desc src, weights, dst;
  dnnl::matmul run;
};
constexpr size_t kMostPlans = 64;  // a thread; oneDNN keeps the code of its last 1024 primitives itself

Plan makePlan(const Key& key) {
  const auto bf16 = dnnl::memory::data_type::bf16;
  const Desc src({key[0], key[2]}, bf16, dnnl::memory::dims{key[3], key[4]});
  const Desc weights({key[2], key[1]}, bf16, dnnl::memory::dims{key[5], key[6]});
  const Desc dst({key[0], key[1]}, dnnl::memory::data_type::f32, dnnl::memory::dims{key[7], 1});
  dnnl::primitive_attr attr;
  if (key[8] != 0) {
    dnnl::post_ops ops;
    ops.append_sum(1.0f);
    attr.set_post_ops(ops);
  }
#if DNNL_VERSION_MAJOR >= 3
  const dnnl::matmul::primitive_desc desc(cpuEngine(), src, weights, dst, attr);
#else
  const dnnl::matmul::primitive_desc desc(dnnl::matmul::desc(src, weights, dst), attr, cpuEngine());
#endif
  return {src, weights, dst, dnnl::matmul(desc)};
}

void multiplyBf16(float* c, int64_t ldc, const MatrixView& a, const MatrixView& b, int64_t m, int64_t n, int64_t k,
                  bool add) {
  thread_local std::map<Key, Plan> plans;
  thread_local dnnl::stream stream(cpuEngine());
  const Key key{m, n, k, a.rowStride, a.colStride, b.rowStride, b.colStride, ldc, add ? 1 : 0};
  auto found = plans.find(key);
  if (found == plans.end()) {
    if (plans.size() >= kMostPlans) plans.clear();
    found = plans.emplace(key, makePlan(key)).first;
  }
  const Plan& plan = found->second;
  dnnl::memory src(plan.src, cpuEngine(), const_cast<void*>(a.data));
  dnnl::memory weights(plan.weights, cpuEngine(), const_cast<void*>(b.data));
  dnnl::memory dst(plan.dst, cpuEngine(), c);
  plan.run.execute(stream, {{DNNL_ARG_SRC, src}, {DNNL_ARG_WEIGHTS, weights}, {DNNL_ARG_DST, dst}});
  stream.wait();
}

}  // namespace

bool available(DType dtype) {
  if (dtype == DType::F32) return true;
#if defined(__x86_64__)
  static const bool bf16 = (dnnl_get_effective_cpu_isa() & dnnl_cpu_isa_avx512_core) == dnnl_cpu_isa_avx512_core;
  return dtype == DType::BF16 && bf16;
#else
  return false;
#endif
}

std::string version() {
  const dnnl_version_t* v = dnnl_version();
  return "oneDNN " + std::to_string(v->major) + "." + std::to_string(v->minor) + "." + std::to_string(v->patch);
}

void multiplyTile(float* c, int64_t ldc, const MatrixView& a, const MatrixView& b, int64_t m, int64_t n, int64_t k,
                  bool add) {
  useOneThread();
  if (a.dtype == DType::BF16) {
    multiplyBf16(c, ldc, a, b, m, n, k, add);
    return;
  }
  const bool transA = a.colStride != 1;
  const bool transB = b.colStride != 1;
  const dnnl_status_t status =
      dnnl_sgemm(transA ? 'T' : 'N', transB ? 'T' : 'N', m, n, k, 1.0f, static_cast<const float*>(a.data),
                 transA ? a.colStride : a.rowStride, static_cast<const float*>(b.data),
                 transB ? b.colStride : b.rowStride, add ? 1.0f : 0.0f, c, ldc);
  if (status != dnnl_success) cpu::multiplyTile(c, ldc, a, b, m, n, k, add, nullptr);
}

}  // namespace viaduct::cpu::onednn

#else

namespace viaduct::cpu::onednn {

bool available(DType) { return false; }
std::string version() { return "none"; }
void multiplyTile(float* c, int64_t ldc, const MatrixView& a, const MatrixView& b, int64_t m, int64_t n, int64_t k,
                  bool add) {
  cpu::multiplyTile(c, ldc, a, b, m, n, k, add, nullptr);
}

}  // namespace viaduct::cpu::onednn

#endif
