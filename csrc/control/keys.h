// Keys of a control connection from the shared secret (docs/control-channel.md, section Keys), over libsodium.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "control/model.h"

namespace hetkv::control {

using Hash = std::array<std::uint8_t, 32>;

Hash hmac_sha256(const std::uint8_t* key, std::size_t key_bytes, const std::uint8_t* data, std::size_t bytes);
// In a time that does not depend on where they differ.
bool equal(const Hash& a, const std::uint8_t* b);
void fill_random(std::uint8_t* out, std::size_t bytes);
// The 16 bytes that name a request on the wire, of a router's id: BLAKE2b with 16 bytes of output.
std::array<std::uint8_t, 16> request_key(const std::string& id);

// All keys of one connection; both sides compute the same.
class Schedule {
 public:
  Schedule(const std::vector<std::uint8_t>& secret, const std::uint8_t* sender_hello,
           const std::uint8_t* receiver_hello, std::size_t hello_bytes);

  // HKDF-Expand for a label of the key table; at most 32 bytes.
  Hash key(const std::string& label) const;
  // What the side of that role sends to show that it has the secret.
  Hash proof(Role role) const;

 private:
  Hash transcript_{};
  Hash root_{};
};

}  // namespace hetkv::control
