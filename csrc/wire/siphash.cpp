#include "wire/siphash.h"

#include <cstring>

namespace hetkv::wire {
namespace {

constexpr std::uint64_t rotate(std::uint64_t value, int bits) {
  return (value << bits) | (value >> (64 - bits));
}

struct State {
  std::uint64_t v0, v1, v2, v3;

  void round() {
    v0 += v1;
    v2 += v3;
    v1 = rotate(v1, 13) ^ v0;
    v3 = rotate(v3, 16) ^ v2;
    v0 = rotate(v0, 32);
    v2 += v1;
    v0 += v3;
    v1 = rotate(v1, 17) ^ v2;
    v3 = rotate(v3, 21) ^ v0;
    v2 = rotate(v2, 32);
  }

  void absorb(std::uint64_t word) {
    v3 ^= word;
    round();
    round();
    v0 ^= word;
  }
};

}  // namespace

std::uint64_t siphash24(const SipKey& key, const void* data, std::size_t bytes) noexcept {
  std::uint64_t k[2];
  std::memcpy(k, key.data(), sizeof(k));
  // The paper's constants: ASCII "somepseudorandomlygeneratedbytes".
  State state{k[0] ^ 0x736f6d6570736575u, k[1] ^ 0x646f72616e646f6du, k[0] ^ 0x6c7967656e657261u,
              k[1] ^ 0x7465646279746573u};
  const auto* at = static_cast<const unsigned char*>(data);
  std::uint64_t word;
  std::size_t left = bytes;
  for (; left >= 8; left -= 8, at += 8) {
    std::memcpy(&word, at, 8);
    state.absorb(word);
  }
  word = 0;
  if (left > 0) std::memcpy(&word, at, left);
  state.absorb(word | static_cast<std::uint64_t>(bytes) << 56);
  state.v2 ^= 0xff;
  for (int i = 0; i < 4; ++i) state.round();
  return state.v0 ^ state.v1 ^ state.v2 ^ state.v3;
}

}  // namespace hetkv::wire
