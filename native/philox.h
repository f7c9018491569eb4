// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) and how keys are made: random
// numbers by place. Scalar form; cpu/random.cc has the vector form of the same function.
#pragma once

#include <cstdint>

#include "half.h"

namespace viaduct {

struct PhiloxBlock {
  uint32_t word[4];
};
struct PhiloxKey {
  uint32_t word[2];
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

VIADUCT_HOST_DEVICE inline PhiloxBlock philox(PhiloxBlock c, PhiloxKey k) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c.word[0];
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c.word[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.word[1] ^ k.word[0], static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.word[3] ^ k.word[1], static_cast<uint32_t>(p0)}};
    k.word[0] += kPhiloxW0;
    k.word[1] += kPhiloxW1;
  }
  return c;
}

/// The finaliser of SplitMix64: a bijection of 64 bits.
VIADUCT_HOST_DEVICE inline uint64_t mixBits(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// What a stream of numbers is for. Streams of one seed with different uses are unrelated.
constexpr uint64_t kUseDropout = 0x9E3779B97F4A7C15ull;
constexpr uint64_t kUseNormal = 0x3C6EF372FE94F82Aull;
constexpr uint64_t kUseJitter = 0xDAA66D2C7DDF743Full;

/// The draw of a channel at a sample's position in a part of the model.
VIADUCT_HOST_DEVICE inline uint32_t drawAt(PhiloxKey key, int64_t sample, int64_t position, uint32_t site,
                                           int64_t channel) {
  const uint64_t id = static_cast<uint64_t>(sample);
  return philox({{static_cast<uint32_t>(channel / 4), static_cast<uint32_t>(position), static_cast<uint32_t>(id),
                  site | static_cast<uint32_t>(id >> 32) << 16}},
                key)
      .word[channel % 4];
}

/// The 64-bit key mix(mix(seed + use) + second), low word first; second is the step or the hash of a parameter's name.
VIADUCT_HOST_DEVICE inline PhiloxKey philoxKey(int64_t seed, int64_t second, uint64_t use) {
  const uint64_t k = mixBits(mixBits(static_cast<uint64_t>(seed) + use) + static_cast<uint64_t>(second));
  return {{static_cast<uint32_t>(k), static_cast<uint32_t>(k >> 32)}};
}

}  // namespace viaduct
