// Authenticated encryption of the frames of one direction of a stream (docs/wire-format.md, section 10). libsodium does
// it; without it no cipher is there. Where the system has OpenSSL 3, that does AES-GCM, which is faster.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace hetkv::transport {

enum class Cipher : std::uint8_t { kNone = 0, kAes256Gcm = 1, kChaCha20Poly1305 = 2 };
using SealKey = std::array<std::uint8_t, 32>;
using SealTag = std::array<std::uint8_t, 16>;

// So many frames are under one key, then the next one is derived from it: 256 GiB of full frames.
constexpr std::uint64_t kFramesPerKey = std::uint64_t{1} << 20;

// This build has it, and this CPU the instructions that AES needs. Any thread.
bool has_cipher(Cipher cipher);

// The cipher must be there. Each call is of the next frame, whose number from 0 is the nonce: none comes twice.
class Seal {
 public:
  Seal(Cipher cipher, const SealKey& key, std::uint64_t frames_per_key = kFramesPerKey);
  ~Seal();
  Seal(Seal&&) noexcept;

  // `head` stays in clear and is authenticated, too. `out` may be `data`.
  void close(const void* head, std::size_t head_bytes, const void* data, std::size_t bytes, std::uint8_t* out,
             SealTag* tag);
  // In place. False: it is not what the peer closed, or not the next frame; `data` is then of no use.
  [[nodiscard]] bool open(const void* head, std::size_t head_bytes, std::uint8_t* data, std::size_t bytes,
                          const SealTag& tag);

 private:
  struct State;
  void advance();
  std::unique_ptr<State> state_;
};

}  // namespace hetkv::transport
