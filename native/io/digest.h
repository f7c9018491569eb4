// Hashes and comparisons of ranges of files: XXH3 finds damage, SHA-256 certifies. SHA-256 is the OpenSSL inside of the
// process (Node carries one), found by name when it is first wanted; without it the caller hashes by other means.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "file.h"

namespace viaduct::io {

/// 128-bit XXH3 of bytes that come piece by piece. Throws ERR_UNSUPPORTED when built without xxHash.
class Xxh3 {
 public:
  Xxh3();
  ~Xxh3();
  Xxh3(const Xxh3&) = delete;
  Xxh3& operator=(const Xxh3&) = delete;
  void update(const void* data, int64_t bytes);
  /// 32 hex digits of the canonical form.
  std::string hex() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

std::string hashRange(const File& file, int64_t offset, int64_t bytes);

/// Whether this process has an OpenSSL that sha256Range can use.
bool hasSha256();
/// 64 hex digits. Throws ERR_UNSUPPORTED where hasSha256() is false.
std::string sha256Range(const File& file, int64_t offset, int64_t bytes);

struct Comparison {
  int64_t differing = 0;  // bytes
  int64_t first = -1;     // offset of the first of them in the range
};
Comparison compareRanges(const File& a, int64_t aOffset, const File& b, int64_t bOffset, int64_t bytes);

}  // namespace viaduct::io
