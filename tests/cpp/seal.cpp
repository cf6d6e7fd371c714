// Prints ten frames of a stream, ciphertext and tag in hexadecimal, with a new key after every third; and opens them.
#include "transport/seal.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int, char** argv) {
  using namespace hetkv::transport;
  const auto cipher = static_cast<Cipher>(std::atoi(argv[1]));
  if (!has_cipher(cipher)) return 1;
  SealKey key;
  for (std::size_t at = 0; at < key.size(); ++at) key[at] = static_cast<std::uint8_t>(at);
  Seal close(cipher, key, 3);
  Seal open(cipher, key, 3);
  SealTag last{};
  std::vector<std::uint8_t> again;
  for (unsigned place = 0; place < 10; ++place) {
    const std::vector<std::uint8_t> plain(100 + place, static_cast<std::uint8_t>(place));
    std::vector<std::uint8_t> out(plain.size());
    SealTag tag;
    close.close("head", 4, plain.data(), plain.size(), out.data(), &tag);
    for (const auto byte : out) std::printf("%02x", byte);
    for (const auto byte : tag) std::printf("%02x", byte);
    std::printf("\n");
    again = out;
    if (!open.open("head", 4, out.data(), out.size(), tag) || out != plain) return 2;
    last = tag;
  }
  // The last frame once more, at another place.
  return open.open("head", 4, again.data(), again.size(), last) ? 3 : 0;
}
