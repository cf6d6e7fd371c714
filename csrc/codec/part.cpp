#include "codec/part.h"

#include <cstring>
#include <string>

#include "codec/nibbles.h"
#include "codec/split.h"

namespace hetkv::codec {

bool PartEncoder::encode(Values values, const std::uint8_t* data, std::size_t bytes, std::vector<std::uint8_t>* out) {
  const std::size_t half = bytes / 2;
  if (half == 0 || bytes % 2 != 0) return false;
  PartHeader header;
  header.plain_bytes = static_cast<std::uint32_t>(bytes);
  header.values = values;
  if (values == Values::kInt4) {
    out->resize(sizeof header + most_packed(bytes));
    std::memcpy(out->data(), &header, sizeof header);
    out->resize(sizeof header + pack_nibbles(data, bytes, out->data() + sizeof header));
    return out->size() < bytes;
  }
  if (!zstd_) zstd_.emplace();
  plane_.resize(half);
  out->resize(bytes);
  if (bytes <= sizeof(PartHeader) + half + 1) return false;
  std::uint8_t* lower = out->data() + sizeof(PartHeader);
  split16(reinterpret_cast<const std::uint16_t*>(data), half, values == Values::kBfloat16, plane_.data(), lower);
  const std::size_t room = bytes - sizeof(PartHeader) - half - 1;  // smaller, or not coded
  const std::size_t coded = zstd_->encode(plane_.data(), half, lower + half, room);
  if (coded == 0) return false;
  std::memcpy(out->data(), &header, sizeof header);
  out->resize(sizeof header + half + coded);
  return true;
}

Status read_header(const std::uint8_t* data, std::size_t size, std::size_t most, ValuesMask accept, PartHeader* out) {
  const auto wrong = [](const std::string& what) { return Status::error(Code::kMalformed, "a coded payload " + what); };
  if (size < sizeof *out) return wrong("has " + std::to_string(size) + " bytes");
  std::memcpy(out, data, sizeof *out);
  if (out->zeros[0] != 0 || out->zeros[1] != 0 || out->zeros[2] != 0) return wrong("has a reserved byte that is not 0");
  const auto kind = std::to_string(static_cast<int>(out->values));
  if (out->values < Values::kBfloat16 || out->values > Values::kInt4)
    return wrong("has values of unknown kind " + kind);
  if ((accept & mask_of(out->values)) == 0) return wrong("has values of kind " + kind + ", which were not agreed on");
  const std::size_t plain = out->plain_bytes;
  if (plain == 0 || plain % 2 != 0 || plain > most) return wrong("claims " + std::to_string(plain) + " bytes");
  if ((out->values != Values::kInt4 && size <= sizeof *out + plain / 2) || size >= plain) {
    return wrong("of " + std::to_string(plain) + " bytes has " + std::to_string(size));
  }
  return {};
}

Status PartDecoder::decode(const PartHeader& header, const std::uint8_t* data, std::size_t size, std::uint8_t* to) {
  const auto wrong = [&] {
    return Status::error(Code::kMalformed,
                         "a coded payload does not decode to its " + std::to_string(header.plain_bytes) + " bytes");
  };
  if (header.values == Values::kInt4) {
    if (!is_packed(data + sizeof header, size - sizeof header, header.plain_bytes)) return wrong();
    unpack_nibbles(data + sizeof header, header.plain_bytes, to);
    return {};
  }
  if (!zstd_) zstd_.emplace();
  const std::size_t half = header.plain_bytes / 2;
  const std::uint8_t* lower = data + sizeof header;
  plane_.resize(half);
  if (!zstd_->decode(lower + half, size - sizeof header - half, plane_.data(), half)) return wrong();
  join16(plane_.data(), lower, half, header.values == Values::kBfloat16, reinterpret_cast<std::uint16_t*>(to));
  return {};
}

}  // namespace hetkv::codec
