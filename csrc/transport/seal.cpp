#include "transport/seal.h"

#include <cstring>
#include <optional>

#include "transport/system_gcm.h"

#ifdef HETKV_WITH_SODIUM
#include <sodium.h>
#endif

namespace hetkv::transport {

#ifdef HETKV_WITH_SODIUM

static_assert(sizeof(SealKey) == crypto_aead_aes256gcm_KEYBYTES);
static_assert(sizeof(SealKey) == crypto_aead_chacha20poly1305_ietf_KEYBYTES);
static_assert(sizeof(SealTag) == crypto_aead_aes256gcm_ABYTES);
static_assert(sizeof(SealTag) == crypto_aead_chacha20poly1305_ietf_ABYTES);

struct Seal::State {
  Cipher cipher;
  SealKey key;
  std::uint64_t frames_per_key;
  std::uint64_t place = 0;            // of the next frame
  std::uint8_t nonce[12] = {};        // of the one under way
  crypto_aead_aes256gcm_state aes{};  // the key's schedule
  std::optional<SystemGcm> system{};  // in its place

  void set_key() {
    if (cipher != Cipher::kAes256Gcm) return;
    if (system) {
      system->set_key(key.data());
    } else {
      crypto_aead_aes256gcm_beforenm(&aes, key.data());
    }
  }
};

bool has_cipher(Cipher cipher) {
  static const bool ready = sodium_init() >= 0;
  if (!ready) return false;
  return cipher == Cipher::kChaCha20Poly1305 ||
         (cipher == Cipher::kAes256Gcm && crypto_aead_aes256gcm_is_available() == 1);
}

Seal::Seal(Cipher cipher, const SealKey& key, std::uint64_t frames_per_key)
    : state_(new State{cipher, key, frames_per_key}) {
  if (cipher == Cipher::kAes256Gcm && has_system_gcm()) state_->system.emplace();
  state_->set_key();
}

Seal::~Seal() {
  if (state_ == nullptr) return;
  sodium_memzero(state_->key.data(), state_->key.size());
  sodium_memzero(&state_->aes, sizeof state_->aes);
}

// The frame's nonce; and at its place a new key, from which the one before cannot be found.
void Seal::advance() {
  State& at = *state_;
  if (at.place != 0 && at.place % at.frames_per_key == 0) {
    constexpr char kLabel[] = "hetkv next stream key";
    crypto_auth_hmacsha256_state hmac;
    crypto_auth_hmacsha256_init(&hmac, at.key.data(), at.key.size());
    crypto_auth_hmacsha256_update(&hmac, reinterpret_cast<const unsigned char*>(kLabel), sizeof kLabel - 1);
    crypto_auth_hmacsha256_final(&hmac, at.key.data());
    at.set_key();
  }
  std::memcpy(at.nonce + 4, &at.place, sizeof at.place);
  ++at.place;
}

void Seal::close(const void* head, std::size_t head_bytes, const void* data, std::size_t bytes, std::uint8_t* out,
                 SealTag* tag) {
  advance();
  const auto* extra = static_cast<const unsigned char*>(head);
  const auto* plain = static_cast<const unsigned char*>(data);
  State& at = *state_;
  if (at.system) {
    if (at.system->close(at.nonce, head, head_bytes, data, bytes, out, tag->data())) return;
    sodium_memzero(out, bytes);  // nothing leaves in clear: the peer ends the link
    tag->fill(0);
  } else if (at.cipher == Cipher::kAes256Gcm) {
    crypto_aead_aes256gcm_encrypt_detached_afternm(out, tag->data(), nullptr, plain, bytes, extra, head_bytes, nullptr,
                                                   at.nonce, &at.aes);
  } else {
    crypto_aead_chacha20poly1305_ietf_encrypt_detached(out, tag->data(), nullptr, plain, bytes, extra, head_bytes,
                                                       nullptr, at.nonce, at.key.data());
  }
}

bool Seal::open(const void* head, std::size_t head_bytes, std::uint8_t* data, std::size_t bytes, const SealTag& tag) {
  advance();
  const auto* extra = static_cast<const unsigned char*>(head);
  State& at = *state_;
  if (at.system) return at.system->open(at.nonce, head, head_bytes, data, bytes, tag.data());
  if (at.cipher == Cipher::kAes256Gcm) {
    return crypto_aead_aes256gcm_decrypt_detached_afternm(data, nullptr, data, bytes, tag.data(), extra, head_bytes,
                                                          at.nonce, &at.aes) == 0;
  }
  return crypto_aead_chacha20poly1305_ietf_decrypt_detached(data, nullptr, data, bytes, tag.data(), extra, head_bytes,
                                                            at.nonce, at.key.data()) == 0;
}

#else

struct Seal::State {};

bool has_cipher(Cipher) {
  return false;
}

Seal::Seal(Cipher, const SealKey&, std::uint64_t) {}
Seal::~Seal() = default;

void Seal::close(const void*, std::size_t, const void*, std::size_t, std::uint8_t*, SealTag*) {}

bool Seal::open(const void*, std::size_t, std::uint8_t*, std::size_t, const SealTag&) {
  return false;
}

#endif

Seal::Seal(Seal&&) noexcept = default;

}  // namespace hetkv::transport
