// SipHash-2-4, 64-bit output (Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace hetkv::wire {

using SipKey = std::array<std::uint8_t, 16>;

std::uint64_t siphash24(const SipKey& key, const void* data, std::size_t bytes) noexcept;

}  // namespace hetkv::wire
