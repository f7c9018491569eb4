// What ops of random numbers take.
#include "ops.h"

namespace viaduct {

namespace {

// Of draws by place for each element of x [T, C].
void checkPlaces(const char* op, const TensorRef& y, const TensorRef& x, const TensorRef& rng,
                 const TensorRef& sampleIds, const TensorRef& positions, int64_t site) {
  checkFloat(op, "x", x);
  checkNdim(op, "x", x, 2);
  checkSameDtype(op, "y", y, "x", x);
  checkSameShape(op, "y", y, "x", x);
  checkContiguous(op, "x", x);
  checkContiguous(op, "y", y);
  checkDtype(op, "rng", rng, {DType::I64});
  checkShape(op, "rng", rng, {2});
  checkIds(op, "sampleIds", sampleIds);
  checkIds(op, "positions", positions);
  checkShape(op, "sampleIds", sampleIds, {x.dim(0)});
  checkShape(op, "positions", positions, {x.dim(0)});
  checkContiguous(op, "rng", rng);
  checkContiguous(op, "sampleIds", sampleIds);
  checkContiguous(op, "positions", positions);
  VIADUCT_CHECK(site >= 0 && site < 65536, "ERR_USAGE", op, "expected a site of 16 bits, got " + std::to_string(site));
}

}  // namespace

void checkDropout(const TensorRef& y, const TensorRef& x, const TensorRef& rng, const TensorRef& sampleIds,
                  const TensorRef& positions, int64_t site, int64_t channelStart, double p) {
  const char* op = "dropout";
  checkPlaces(op, y, x, rng, sampleIds, positions, site);
  VIADUCT_CHECK(p >= 0 && p < 1, "ERR_USAGE", op, "expected 0 <= p < 1, got " + std::to_string(p));
  VIADUCT_CHECK(channelStart >= 0 && channelStart + x.dim(1) <= int64_t{1} << 34, "ERR_USAGE", op,
                "expected channels below 2^34, got channelStart " + std::to_string(channelStart));
}

void checkJitter(const TensorRef& y, const TensorRef& x, const TensorRef& rng, const TensorRef& sampleIds,
                 const TensorRef& positions, int64_t site, double eps) {
  const char* op = "jitter";
  checkPlaces(op, y, x, rng, sampleIds, positions, site);
  VIADUCT_CHECK(eps >= 0 && eps < 1, "ERR_USAGE", op, "expected 0 <= eps < 1, got " + std::to_string(eps));
}

void checkRandomNormal(const TensorRef& y, const Dims& start, const Dims& logicalStride) {
  checkFloat("randomNormal", "y", y);
  VIADUCT_CHECK(start.n == y.ndim && logicalStride.n == y.ndim, "ERR_SHAPE", "randomNormal",
                "expected start and logicalStride of " + std::to_string(y.ndim) + " numbers, got " +
                    std::to_string(start.n) + " and " + std::to_string(logicalStride.n));
}

}  // namespace viaduct
