// Which algorithm computes a product, as the twin of cuBLASLt has seen it: a program that prints a line a case, "NAME: " and how
// often each algorithm was started, with what is wrong with the result behind it. Read by matmulTuning.test.ts.
#include <cstdio>
#include <string>
#include <vector>

#include "native/cuda/cuda_backend.h"
#include "native/cuda/emulation/matmul_host.h"
#include "native/cuda/runtime.h"
#include "native/plugin.h"

using namespace viaduct;

extern "C" viaduct::Plugin* viaductPlugin();

int main() {
  auto backend = viaductPlugin()->open({0, {}, 7});
  auto stream = backend->createStream(1);
  Stream& s = *stream;
  constexpr int64_t most = 64;
  const auto matrix = [&](double value) {
    Out x;
    x.data = backend->allocate(most * most * sizeof(float), s);
    x.dtype = DType::F32;
    x.ndim = 2;
    x.shape[0] = x.shape[1] = most;
    x.stride[0] = most;
    x.stride[1] = 1;
    backend->fill(s, x, value);
    return x;
  };
  const Out y = matrix(0), a = matrix(1), b = matrix(2);
  const auto part = [](auto role, const TensorRef& x, int64_t rows, int64_t columns) {
    static_cast<TensorRef&>(role) = x;
    role.shape[0] = rows;
    role.shape[1] = columns;
    return role;
  };
  std::vector<float> host(most * most);
  const std::shared_ptr<void> bytes(host.data(), [](void*) {});
  const auto report = [&](const char* name, int64_t rows, int64_t columns, float expected) {
    backend->download(s, bytes, part(In(), y, most, most), host.size() * sizeof(float));
    s.drain();
    std::string text;
    for (int64_t starts : emulation::takeProductStarts()) text += std::to_string(starts) + " ";
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        if (host[static_cast<size_t>(i * most + j)] == expected) continue;
        std::printf("%s: %sand %g in place of %g\n", name, text.c_str(), host[static_cast<size_t>(i * most + j)],
                    expected);
        return;
      }
    }
    std::printf("%s: %s\n", name, text.c_str());
  };
  const auto multiply = [&](const char* name, int64_t m, int64_t n, int64_t k, bool accumulate, int times,
                            double before, float expected) {
    backend->fill(s, y, before);
    for (int i = 0; i < times; ++i) {
      backend->matmul(s, part(InOut(), y, m, n), part(In(), a, m, k), part(In(), b, k, n), OptIn(), false, false,
                      accumulate);
    }
    report(name, m, n, expected);
  };
  const auto rows = [&](const char* name, int64_t m, int64_t n, int64_t k, int64_t whole) {
    backend->fill(s, y, 0);
    backend->matmulRows(s, part(Out(), y, m, n), part(In(), a, m, k), part(In(), b, k, n), OptIn(), false, whole);
    report(name, m, n, static_cast<float>(2 * k));
  };
  multiply("guess", 32, 32, 32, false, 2, 7, 64);
  backend->setMatmulEngine("tuned");
  multiply("first", 32, 32, 32, false, 1, 7, 64);
  multiply("later", 32, 32, 32, false, 2, 7, 64);
  multiply("accumulating", 32, 32, 32, true, 2, 7, 7 + 2 * 64);
  multiply("small", 32, 8, 32, false, 1, 7, 64);
  rows("rowsOfTuned", 8, 32, 32, 32);
  rows("rowsFirst", 8, 32, 48, 32);
  multiply("wholeAfterRows", 32, 32, 48, false, 1, 7, 96);
  backend->setMatmulEngine("auto");
  multiply("guessAgain", 32, 32, 32, false, 1, 7, 64);

  // Three experts of 8, 0 and 24 rows. What is in one launch is not seen as products.
  const std::vector<int64_t> counts{8, 0, 24};
  const auto experts = [&](const char* name, const char* engine, int64_t n) {
    backend->setGroupedMatmulEngine(engine);
    backend->fill(s, y, 0);
    const std::vector<In> matrices(counts.size(), part(In(), b, n, 32));
    backend->groupedMatmul(s, part(Out(), y, 32, n), part(In(), a, 32, 32), matrices, counts, true);
    report(name, 32, n, 64);
    std::printf("%sTogether: %lld\n", name, static_cast<long long>(emulation::takeGroupedStarts()));
  };
  experts("experts", "auto", 16);
  experts("expertsApart", "streams", 16);
  experts("expertsForced", "one_launch", 16);

  // Products that end late: each of these needs rows that other streams had in the one before.
  backend->setGroupedMatmulEngine("streams");
  emulation::delayProducts(true);
  const Out rows0 = part(Out(), a, 32, 16), rows1 = part(Out(), y, 32, 16);
  backend->fill(s, a, 1);
  backend->fill(s, b, 1. / 16);
  const auto layer = [&](const Out& to, const TensorRef& from, const std::vector<int64_t>& rowCounts) {
    const std::vector<In> matrices(rowCounts.size(), part(In(), b, 16, 16));
    backend->groupedMatmul(s, to, part(In(), from, 32, 16), matrices, rowCounts, true);
  };
  layer(rows1, rows0, {8, 8, 8, 8});
  layer(rows0, rows1, {1, 29, 1, 1});
  layer(rows1, rows0, {3, 20, 4, 5});
  report("expertsInOrder", 32, 16, 1);
  emulation::delayProducts(false);
  return 0;
}
