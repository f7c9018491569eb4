// The algorithms that the twin of cuBLASLt pretends to have, for the test of choosing among them.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace viaduct::emulation {

/// Emulated microseconds of each algorithm in the order of the heuristic: much more than the loops take; 0: it takes no call.
constexpr std::array<int, 5> kProductTimes{3000000, 0, 1000000, 1005000, 2000000};

/// How often each was started since the last call, for idle streams.
std::vector<int64_t> takeProductStarts();

/// While `delayed`, a product ends some time after its call has returned, behind what its stream had before.
void delayProducts(bool delayed);

/// How often products of groups were asked for in one launch, since the last call.
int64_t takeGroupedStarts();

}  // namespace viaduct::emulation
