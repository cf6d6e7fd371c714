#include "codec/zstd.h"

#include <dlfcn.h>

#include "system_library.h"

namespace hetkv::codec {
namespace {

// Of zstd.h 1.4.0 and later, whose ABI is stable. The last one is experimental by zstd's own word: where a library does
// not know it, literals of level 1 are Huffman coded anyway.
constexpr int kLevel = 100;
constexpr int kLiteralCompression = 1002;
constexpr int kHuffman = 1;
constexpr int kFast = -50;  // as good as no search for matches, of which exponents have none

struct Library {
  void* (*create_encoder)() = nullptr;
  std::size_t (*free_encoder)(void*) = nullptr;
  std::size_t (*set)(void*, int, int) = nullptr;
  std::size_t (*encode)(void*, void*, std::size_t, const void*, std::size_t) = nullptr;
  void* (*create_decoder)() = nullptr;
  std::size_t (*free_decoder)(void*) = nullptr;
  std::size_t (*decode)(void*, void*, std::size_t, const void*, std::size_t) = nullptr;
  unsigned (*is_error)(std::size_t) = nullptr;
  bool whole = false;
};

const Library& library() {
  static const Library found = [] {
    Library made;
    void* handle = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
    made.whole = handle != nullptr && find_function(handle, "ZSTD_createCCtx", &made.create_encoder) &&
                 find_function(handle, "ZSTD_freeCCtx", &made.free_encoder) &&
                 find_function(handle, "ZSTD_CCtx_setParameter", &made.set) &&
                 find_function(handle, "ZSTD_compress2", &made.encode) &&
                 find_function(handle, "ZSTD_createDCtx", &made.create_decoder) &&
                 find_function(handle, "ZSTD_freeDCtx", &made.free_decoder) &&
                 find_function(handle, "ZSTD_decompressDCtx", &made.decode) &&
                 find_function(handle, "ZSTD_isError", &made.is_error);
    return made;
  }();
  return found;
}

}  // namespace

bool has_zstd() {
  return library().whole;
}

ZstdEncoder::ZstdEncoder() : context_(library().create_encoder()) {
  if (context_ == nullptr) return;
  const Library& zstd = library();
  static_cast<void>(zstd.set(context_, kLevel, kFast));
  if (zstd.is_error(zstd.set(context_, kLiteralCompression, kHuffman)) != 0) {
    static_cast<void>(zstd.set(context_, kLevel, 1));
  }
}

ZstdEncoder::~ZstdEncoder() {
  if (context_ != nullptr) library().free_encoder(context_);
}

std::size_t ZstdEncoder::encode(const std::uint8_t* data, std::size_t bytes, std::uint8_t* out, std::size_t room) {
  if (context_ == nullptr) return 0;
  const std::size_t made = library().encode(context_, out, room, data, bytes);
  return library().is_error(made) != 0 ? 0 : made;
}

ZstdDecoder::ZstdDecoder() : context_(library().create_decoder()) {}

ZstdDecoder::~ZstdDecoder() {
  if (context_ != nullptr) library().free_decoder(context_);
}

bool ZstdDecoder::decode(const std::uint8_t* data, std::size_t size, std::uint8_t* out, std::size_t bytes) {
  return context_ != nullptr && library().decode(context_, out, bytes, data, size) == bytes;
}

}  // namespace hetkv::codec
