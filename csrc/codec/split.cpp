#include "codec/split.h"

namespace hetkv::codec {
namespace {

template <bool kTurn>
void split(const std::uint16_t* __restrict values, std::size_t count, std::uint8_t* __restrict upper,
           std::uint8_t* __restrict lower) {
  for (std::size_t i = 0; i < count; ++i) {
    const auto value = values[i];
    const auto turned = kTurn ? static_cast<std::uint16_t>(value << 1 | value >> 15) : value;
    upper[i] = static_cast<std::uint8_t>(turned >> 8);
    lower[i] = static_cast<std::uint8_t>(turned);
  }
}

template <bool kTurn>
void join(const std::uint8_t* __restrict upper, const std::uint8_t* __restrict lower, std::size_t count,
          std::uint16_t* __restrict values) {
  for (std::size_t i = 0; i < count; ++i) {
    const auto turned = static_cast<std::uint16_t>(upper[i] << 8 | lower[i]);
    values[i] = kTurn ? static_cast<std::uint16_t>(turned >> 1 | turned << 15) : turned;
  }
}

}  // namespace

void split16(const std::uint16_t* values, std::size_t count, bool turn, std::uint8_t* upper, std::uint8_t* lower) {
  turn ? split<true>(values, count, upper, lower) : split<false>(values, count, upper, lower);
}

void join16(const std::uint8_t* upper, const std::uint8_t* lower, std::size_t count, bool turn, std::uint16_t* values) {
  turn ? join<true>(upper, lower, count, values) : join<false>(upper, lower, count, values);
}

}  // namespace hetkv::codec
