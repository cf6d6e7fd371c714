#include "transport/system_gcm.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

#include "system_library.h"

namespace hetkv::transport {
namespace {

// Of OpenSSL 3's evp.h, whose ABI is stable.
constexpr int kGetTag = 0x10;
constexpr int kSetTag = 0x11;
constexpr int kTagBytes = 16;

struct Library {
  void* (*create)() = nullptr;
  void (*free)(void*) = nullptr;
  const void* (*aes_256_gcm)() = nullptr;
  int (*init)(void*, const void*, void*, const unsigned char*, const unsigned char*, int) = nullptr;
  int (*update)(void*, unsigned char*, int*, const unsigned char*, int) = nullptr;
  int (*final)(void*, unsigned char*, int*) = nullptr;
  int (*control)(void*, int, int, void*) = nullptr;
  void (*cleanse)(void*, std::size_t) = nullptr;
  bool whole = false;
};

const Library& library() {
  static const Library found = [] {
    Library made;
    const char* named = std::getenv("HETKV_LIBCRYPTO");
    if (named != nullptr && std::string(named) == "none") return made;
    void* handle = dlopen("libcrypto.so.3", RTLD_NOW | RTLD_LOCAL);
    made.whole = handle != nullptr && find_function(handle, "EVP_CIPHER_CTX_new", &made.create) &&
                 find_function(handle, "EVP_CIPHER_CTX_free", &made.free) &&
                 find_function(handle, "EVP_aes_256_gcm", &made.aes_256_gcm) &&
                 find_function(handle, "EVP_CipherInit_ex", &made.init) &&
                 find_function(handle, "EVP_CipherUpdate", &made.update) &&
                 find_function(handle, "EVP_CipherFinal_ex", &made.final) &&
                 find_function(handle, "EVP_CIPHER_CTX_ctrl", &made.control) &&
                 find_function(handle, "OPENSSL_cleanse", &made.cleanse);
    return made;
  }();
  return found;
}

}  // namespace

bool has_system_gcm() {
  return library().whole;
}

SystemGcm::SystemGcm() : context_(library().create()) {}

SystemGcm::~SystemGcm() {
  library().free(context_);  // clears it, too
  library().cleanse(key_, sizeof key_);
}

void SystemGcm::set_key(const std::uint8_t* key) {
  std::memcpy(key_, key, sizeof key_);
  keyed_ = -1;
}

bool SystemGcm::run(bool close, const std::uint8_t* nonce, const void* head, std::size_t head_bytes, const void* data,
                    std::size_t bytes, std::uint8_t* out) {
  if (context_ == nullptr) return false;
  const Library& evp = library();
  const bool fresh = keyed_ != int{close};
  const void* cipher = fresh ? evp.aes_256_gcm() : nullptr;
  if (evp.init(context_, cipher, nullptr, fresh ? key_ : nullptr, nonce, int{close}) != 1) return false;
  keyed_ = int{close};
  int made = 0;
  if (head_bytes > 0 && evp.update(context_, nullptr, &made, static_cast<const unsigned char*>(head),
                                   static_cast<int>(head_bytes)) != 1) {
    return false;
  }
  constexpr std::size_t kMost = std::size_t{1} << 30;  // an int's
  const auto* from = static_cast<const unsigned char*>(data);
  for (std::size_t at = 0; at < bytes; at += kMost) {
    if (evp.update(context_, out + at, &made, from + at, static_cast<int>(std::min(kMost, bytes - at))) != 1)
      return false;
  }
  return true;
}

bool SystemGcm::close(const std::uint8_t* nonce, const void* head, std::size_t head_bytes, const void* data,
                      std::size_t bytes, std::uint8_t* out, std::uint8_t* tag) {
  unsigned char rest[16];
  int made = 0;
  return run(true, nonce, head, head_bytes, data, bytes, out) && library().final(context_, rest, &made) == 1 &&
         library().control(context_, kGetTag, kTagBytes, tag) == 1;
}

bool SystemGcm::open(const std::uint8_t* nonce, const void* head, std::size_t head_bytes, std::uint8_t* data,
                     std::size_t bytes, const std::uint8_t* tag) {
  unsigned char rest[16];
  unsigned char given[kTagBytes];
  std::memcpy(given, tag, sizeof given);
  int made = 0;
  return run(false, nonce, head, head_bytes, data, bytes, data) &&
         library().control(context_, kSetTag, kTagBytes, given) == 1 && library().final(context_, rest, &made) == 1;
}

}  // namespace hetkv::transport
