// See digest.h. Every range passes through one or two pieces of scratch memory.
#include "digest.h"

#include <dlfcn.h>

#include <algorithm>

#include "../errors.h"
#include "scratch.h"

#ifdef VIADUCT_HAVE_XXHASH
#define XXH_INLINE_ALL
#include <xxhash.h>
#endif

namespace viaduct::io {
namespace {

std::string hexOf(const unsigned char* bytes, size_t n) {
  static const char digits[] = "0123456789abcdef";
  std::string hex;
  for (size_t i = 0; i < n; ++i) {
    hex += digits[bytes[i] >> 4];
    hex += digits[bytes[i] & 15];
  }
  return hex;
}

/// The range in pieces: each(data, bytes).
template <typename F>
void stream(const File& file, int64_t offset, int64_t bytes, F each) {
  Scratch scratch;
  for (int64_t i = 0; i < bytes; i += kScratchBytes) {
    const int64_t n = std::min(kScratchBytes, bytes - i);
    file.readAt(scratch.data(), static_cast<size_t>(n), offset + i);
    each(scratch.data(), n);
  }
}

/// The functions of OpenSSL (1.1 and later) that a digest needs.
struct OpenSsl {
  void* (*create)() = nullptr;
  void (*free)(void*) = nullptr;
  const void* (*sha256)() = nullptr;
  int (*init)(void*, const void*, void*) = nullptr;
  int (*update)(void*, const void*, size_t) = nullptr;
  int (*finish)(void*, unsigned char*, unsigned int*) = nullptr;

  OpenSsl() {
    find("EVP_MD_CTX_new", create);
    find("EVP_MD_CTX_free", free);
    find("EVP_sha256", sha256);
    find("EVP_DigestInit_ex", init);
    find("EVP_DigestUpdate", update);
    find("EVP_DigestFinal_ex", finish);
  }
  bool complete() const { return create && free && sha256 && init && update && finish; }

 private:
  template <typename F>
  static void find(const char* name, F& function) {
    function = reinterpret_cast<F>(::dlsym(RTLD_DEFAULT, name));
  }
};

const OpenSsl& openSsl() {
  static const OpenSsl functions;
  return functions;
}

}  // namespace

#ifdef VIADUCT_HAVE_XXHASH
struct Xxh3::State {
  XXH3_state_t* xxh = XXH3_createState();
  ~State() { XXH3_freeState(xxh); }
};

Xxh3::Xxh3() : state_(std::make_unique<State>()) {
  VIADUCT_CHECK(state_->xxh != nullptr, "ERR_OUT_OF_MEMORY", "file", "expected memory for a hash, got none");
  XXH3_128bits_reset(state_->xxh);
}

void Xxh3::update(const void* data, int64_t bytes) {
  XXH3_128bits_update(state_->xxh, data, static_cast<size_t>(bytes));
}

std::string Xxh3::hex() const {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state_->xxh));
  return hexOf(canonical.digest, sizeof canonical.digest);
}
#else
struct Xxh3::State {};
Xxh3::Xxh3() {
  throw Error("ERR_UNSUPPORTED", "hashRange",
              "this addon was built without xxHash: install libxxhash-dev and build again");
}
void Xxh3::update(const void*, int64_t) {}
std::string Xxh3::hex() const { return {}; }
#endif
Xxh3::~Xxh3() = default;

std::string hashRange(const File& file, int64_t offset, int64_t bytes) {
  Xxh3 hash;
  stream(file, offset, bytes, [&](const char* data, int64_t n) { hash.update(data, n); });
  return hash.hex();
}

bool hasSha256() { return openSsl().complete(); }

std::string sha256Range(const File& file, int64_t offset, int64_t bytes) {
  VIADUCT_CHECK(hasSha256(), "ERR_UNSUPPORTED", "sha256Range", "expected OpenSSL in this process, found none");
  const OpenSsl& ssl = openSsl();
  const auto check = [](bool ok) {
    VIADUCT_CHECK(ok, "ERR_UNSUPPORTED", "sha256Range", "expected OpenSSL to make a SHA-256, got its refusal");
  };
  const std::unique_ptr<void, void (*)(void*)> context(ssl.create(), ssl.free);
  check(context != nullptr && ssl.init(context.get(), ssl.sha256(), nullptr) == 1);
  stream(file, offset, bytes,
         [&](const char* data, int64_t n) { check(ssl.update(context.get(), data, static_cast<size_t>(n)) == 1); });
  unsigned char digest[32];
  unsigned int length = 0;
  check(ssl.finish(context.get(), digest, &length) == 1 && length == sizeof digest);
  return hexOf(digest, length);
}

Comparison compareRanges(const File& a, int64_t aOffset, const File& b, int64_t bOffset, int64_t bytes) {
  Scratch other;
  Comparison result;
  int64_t at = 0;
  stream(a, aOffset, bytes, [&](const char* data, int64_t n) {
    b.readAt(other.data(), static_cast<size_t>(n), bOffset + at);
    if (!std::equal(data, data + n, other.data())) {
      for (int64_t k = 0; k < n; ++k) {
        if (data[k] == other.data()[k]) continue;
        if (result.first < 0) result.first = at + k;
        result.differing += 1;
      }
    }
    at += n;
  });
  return result;
}

}  // namespace viaduct::io
