// Binds csrc/codec/. Checks what the C++ side trusts its callers with.
#include "bind.h"
#include "codec/part.h"
#include "codec/split.h"
#include "job.h"

namespace hetkv {
namespace {

std::uint8_t* bytes_of(const py::buffer& buffer, std::size_t size, bool writable) {
  const py::buffer_info info = buffer.request(writable);
  require(info.ndim == 1 && info.itemsize == 1 && (info.size < 2 || info.strides[0] == 1) &&
              static_cast<std::size_t>(info.size) == size,
          "the buffer must be " + std::to_string(size) + " contiguous bytes");
  return static_cast<std::uint8_t*>(info.ptr);
}

// Two bytes a value; at an even address.
std::uint16_t* values_of(const py::buffer& buffer, std::size_t count, bool writable) {
  std::uint8_t* bytes = bytes_of(buffer, 2 * count, writable);
  require(reinterpret_cast<std::uintptr_t>(bytes) % 2 == 0, "the values begin at an odd address");
  return reinterpret_cast<std::uint16_t*>(bytes);
}

}  // namespace

void bind_codec(py::module_& m) {
  using namespace py::literals;
  m.def(
      "split16",
      [](const py::buffer& values, const py::buffer& upper, const py::buffer& lower, bool turn) {
        const auto count = static_cast<std::size_t>(upper.request().size);
        codec::split16(values_of(values, count, false), count, turn, bytes_of(upper, count, true),
                       bytes_of(lower, count, true));
      },
      "values"_a, "upper"_a, "lower"_a, "turn"_a, "Bytes of 16-bit values in two planes: csrc/codec/split.h.");
  m.def(
      "join16",
      [](const py::buffer& upper, const py::buffer& lower, const py::buffer& values, bool turn) {
        const auto count = static_cast<std::size_t>(upper.request().size);
        codec::join16(bytes_of(upper, count, false), bytes_of(lower, count, false), count, turn,
                      values_of(values, count, true));
      },
      "upper"_a, "lower"_a, "values"_a, "turn"_a, "The inverse of `split16`.");
  m.def("has_zstd", &codec::has_zstd, "libzstd.so.1 is there, which the codec `lossless` needs.");
  m.def(
      "encode_part",
      [](const py::buffer& data, int values) -> std::optional<py::bytes> {
        require(values >= 1 && values <= 3, "values are 1 (bfloat16), 2 (float16) or 3 (int4)");
        require(values == 3 || codec::has_zstd(), "there is no libzstd here");
        const auto count = static_cast<std::size_t>(data.request().size) / 2;
        const auto* bytes = reinterpret_cast<const std::uint8_t*>(values_of(data, count, false));
        codec::PartEncoder encoder;
        std::vector<std::uint8_t> out;
        if (!encoder.encode(static_cast<codec::Values>(values), bytes, 2 * count, &out)) return std::nullopt;
        return py::bytes(reinterpret_cast<const char*>(out.data()), out.size());
      },
      "data"_a, "values"_a, "A coded part (csrc/codec/part.h) of bytes at an even address; None: it is no smaller.");
  m.def(
      "decode_part",
      [](const py::bytes& coded, std::size_t most) {
        const std::string_view view = coded;
        const auto* data = reinterpret_cast<const std::uint8_t*>(view.data());
        codec::PartHeader header;
        constexpr codec::ValuesMask kAll = codec::kZstdValues | codec::mask_of(codec::Values::kInt4);
        check(codec::read_header(data, view.size(), most, kAll, &header));
        require(header.values == codec::Values::kInt4 || codec::has_zstd(), "there is no libzstd here");
        std::vector<std::uint16_t> out(header.plain_bytes / 2);
        auto* to = reinterpret_cast<std::uint8_t*>(out.data());
        codec::PartDecoder decoder;
        check(decoder.decode(header, data, view.size(), to));
        return py::bytes(reinterpret_cast<const char*>(to), header.plain_bytes);
      },
      "coded"_a, "most"_a, "The inverse. Raises MalformedError; parts of over `most` bytes are malformed, too.");
}

}  // namespace hetkv
