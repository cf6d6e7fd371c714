// Payload errors against the checksum that a receiver compares: `hetkv_payload_errors COUNT SEED`. Payloads of random
// sizes and contents, each with one error of a random kind. Exit status 1: one would have been accepted.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "remap/checksum.h"
#include "world.h"

namespace hetkv::sim {
namespace {

constexpr std::size_t kMostBytes = 64 * 1024;
constexpr const char* kKinds[] = {"one bit",      "2 to 64 bits",  "a burst of bits", "words swapped",
                                  "bytes zeroed", "words doubled", "bytes of 0xff",   "another offset"};
constexpr std::size_t kNumKinds = std::size(kKinds);

void flip(std::vector<std::uint8_t>& bytes, std::size_t bit) {
  bytes[bit / 8] ^= static_cast<std::uint8_t>(1u << bit % 8);
}

// Changes the payload; it may come out as it was.
void spoil(std::size_t kind, Random& random, std::vector<std::uint8_t>& bytes) {
  const std::size_t size = bytes.size();
  const std::size_t from = random.below(size);
  const std::size_t length = 1 + random.below(std::min<std::size_t>(size - from, 256));
  const auto word = [&] { return random.below(size / 8) * 8; };
  switch (kind) {
    case 0:
      return flip(bytes, random.below(size * 8));
    case 1:
      for (std::uint64_t i = random.between(2, 64); i > 0; --i) flip(bytes, random.below(size * 8));
      return;
    case 2:
      for (std::size_t bit = from * 8; bit < (from + length) * 8; ++bit) {
        if (random.chance(0.5)) flip(bytes, bit);
      }
      return;
    case 3:
    case 5: {
      const std::size_t a = word();
      const std::size_t b = word();
      if (kind == 3) std::swap_ranges(bytes.begin() + a, bytes.begin() + a + 8, bytes.begin() + b);
      if (kind == 5) std::copy_n(bytes.begin() + a, 8, bytes.begin() + b);
      return;
    }
    case 4:
    case 6:
      std::fill_n(bytes.begin() + from, length, kind == 4 ? 0 : 0xff);
      return;
    default:
      std::rotate(bytes.begin(), bytes.begin() + from / 8 * 8, bytes.end());
  }
}

int main(int argc, char** argv) {
  const std::uint64_t count = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1'000'000;
  const std::uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  Random random(first);
  std::uint64_t tried[kNumKinds] = {};
  std::uint64_t accepted = 0;
  std::vector<std::uint8_t> good;
  for (std::uint64_t done = 0; done < count;) {
    // Multiples of 8, as every payload is; mostly small, as errors in small payloads are the hardest to see.
    good.resize(8 * (1 + random.delay(kMostBytes / 8)));
    const bool sparse = random.chance(0.3);  // caches hold many zeros
    for (auto& byte : good) byte = sparse && random.chance(0.9) ? 0 : static_cast<std::uint8_t>(random.next());
    const std::uint64_t seed = random.next();
    const std::uint64_t sum = remap::checksum_cpu(good.data(), good.size(), 0, seed);
    for (int i = 0; i < 16 && done < count; ++i) {
      const std::size_t kind = random.below(kNumKinds);
      auto bad = good;
      spoil(kind, random, bad);
      if (bad == good) continue;
      ++done;
      ++tried[kind];
      if (remap::checksum_cpu(bad.data(), bad.size(), 0, seed) != sum) continue;
      ++accepted;
      std::printf("accepted: %s in %zu bytes\n", kKinds[kind], good.size());
    }
  }
  std::printf("{\"errors\": %llu, \"accepted\": %llu, \"seed\": %llu, \"kinds\": {", (unsigned long long)count,
              (unsigned long long)accepted, (unsigned long long)first);
  for (std::size_t i = 0; i < kNumKinds; ++i) {
    std::printf("%s\"%s\": %llu", i == 0 ? "" : ", ", kKinds[i], (unsigned long long)tried[i]);
  }
  std::printf("}}\n");
  return accepted == 0 ? 0 : 1;
}

}  // namespace
}  // namespace hetkv::sim

int main(int argc, char** argv) {
  return hetkv::sim::main(argc, argv);
}
