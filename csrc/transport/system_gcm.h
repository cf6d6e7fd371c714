// AES-256-GCM by the system's OpenSSL 3 (libcrypto.so.3), which has wider kernels than libsodium. Loaded when it is
// first asked for, unless HETKV_LIBCRYPTO is `none`.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hetkv::transport {

// Any thread.
bool has_system_gcm();

// Needs has_system_gcm(). Not for several threads at once.
class SystemGcm {
 public:
  SystemGcm();
  ~SystemGcm();
  SystemGcm(const SystemGcm&) = delete;
  SystemGcm& operator=(const SystemGcm&) = delete;

  // Of 32 bytes, which may change afterwards.
  void set_key(const std::uint8_t* key);
  // A nonce has 12 bytes, a tag 16. `out` may be `data`. False: it did not work, and `out` is of no use.
  [[nodiscard]] bool close(const std::uint8_t* nonce, const void* head, std::size_t head_bytes, const void* data,
                           std::size_t bytes, std::uint8_t* out, std::uint8_t* tag);
  [[nodiscard]] bool open(const std::uint8_t* nonce, const void* head, std::size_t head_bytes, std::uint8_t* data,
                          std::size_t bytes, const std::uint8_t* tag);

 private:
  bool run(bool close, const std::uint8_t* nonce, const void* head, std::size_t head_bytes, const void* data,
           std::size_t bytes, std::uint8_t* out);

  void* context_;
  std::uint8_t key_[32] = {};
  int keyed_ = -1;  // the direction that has the key in its context
};

}  // namespace hetkv::transport
