// zstd of the system (libzstd.so.1), loaded when it is first asked for: one block of bytes in, one frame out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace hetkv::codec {

// The library is there, and has what is used of it. Any thread.
bool has_zstd();

// Both need has_zstd(). Not for several threads at once.
class ZstdEncoder {
 public:
  ZstdEncoder();
  ~ZstdEncoder();
  // Bytes of the frame, or 0 where it does not fit into `room`.
  std::size_t encode(const std::uint8_t* data, std::size_t bytes, std::uint8_t* out, std::size_t room);

 private:
  void* context_;
};

class ZstdDecoder {
 public:
  ZstdDecoder();
  ~ZstdDecoder();
  // Any bytes, also hostile ones. False: they do not decode to exactly `bytes` bytes. Takes no memory.
  [[nodiscard]] bool decode(const std::uint8_t* data, std::size_t size, std::uint8_t* out, std::size_t bytes);

 private:
  void* context_;
};

}  // namespace hetkv::codec
