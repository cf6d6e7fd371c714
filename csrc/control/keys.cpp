#include "control/keys.h"

#include <sodium.h>

namespace hetkv::control {

Hash hmac_sha256(const std::uint8_t* key, std::size_t key_bytes, const std::uint8_t* data, std::size_t bytes) {
  Hash out{};
  crypto_auth_hmacsha256_state state;
  crypto_auth_hmacsha256_init(&state, key, key_bytes);
  crypto_auth_hmacsha256_update(&state, data, bytes);
  crypto_auth_hmacsha256_final(&state, out.data());
  return out;
}

bool equal(const Hash& a, const std::uint8_t* b) {
  return sodium_memcmp(a.data(), b, a.size()) == 0;
}

void fill_random(std::uint8_t* out, std::size_t bytes) {
  randombytes_buf(out, bytes);
}

std::array<std::uint8_t, 16> request_key(const std::string& id) {
  std::array<std::uint8_t, 16> out{};
  crypto_generichash(out.data(), out.size(), reinterpret_cast<const unsigned char*>(id.data()), id.size(), nullptr, 0);
  return out;
}

Schedule::Schedule(const std::vector<std::uint8_t>& secret, const std::uint8_t* sender_hello,
                   const std::uint8_t* receiver_hello, std::size_t hello_bytes) {
  std::vector<std::uint8_t> both(sender_hello, sender_hello + hello_bytes);
  both.insert(both.end(), receiver_hello, receiver_hello + hello_bytes);
  crypto_hash_sha256(transcript_.data(), both.data(), both.size());
  root_ = hmac_sha256(transcript_.data(), transcript_.size(), secret.data(), secret.size());
}

Hash Schedule::key(const std::string& label) const {
  const std::string info = "hetkv control 2 " + label + '\x01';  // one block is enough for 32 bytes
  return hmac_sha256(root_.data(), root_.size(), reinterpret_cast<const std::uint8_t*>(info.data()), info.size());
}

Hash Schedule::proof(Role role) const {
  const Hash with = key(std::string("proof ") + name_of(role));
  return hmac_sha256(with.data(), with.size(), transcript_.data(), transcript_.size());
}

}  // namespace hetkv::control
