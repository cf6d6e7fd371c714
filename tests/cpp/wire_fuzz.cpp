// Mutates the messages in the files it is given and runs the codec on them, MAC repaired, so that a sanitizer sees
// every read past the end. Checks that what is accepted encodes to the same bytes again. Prints a count per verdict.
//
//   g++ -std=c++17 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover -Icsrc tests/cpp/wire_fuzz.cpp
//       csrc/wire/*.cpp -o wire_fuzz && ./wire_fuzz 1000000 tests/vectors/*/*.bin      (on one line)
#include <array>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>

#include "wire_check.h"

namespace {

using namespace hetkv;

void mutate(Bytes* message, std::mt19937_64* random) {
  constexpr std::uint64_t kEdges[] = {0, 1, 7, 8, 1u << 16, 1u << 31, UINT32_MAX, std::uint64_t{1} << 63, UINT64_MAX};
  auto& r = *random;
  for (auto count = r() % 4; count > 0 && !message->empty(); --count) {
    const std::size_t width = std::size_t{1} << r() % 4;
    if (message->size() < width) break;
    const std::size_t at = r() % (message->size() / width) * width;
    std::uint64_t value;
    switch (r() % 4) {
      case 0:
        value = r();
        break;
      case 1:
        value = kEdges[r() % std::size(kEdges)];
        break;
      default:  // near what was there
        value = 0;
        std::memcpy(&value, message->data() + at, width);
        value = r() % 2 == 0 ? value + r() % 17 - 8 : value ^ std::uint64_t{1} << r() % 64;
    }
    std::memcpy(message->data() + at, &value, width);
  }
  if (r() % 4 == 0) message->resize(r() % (message->size() + 32));
  if (r() % 2 == 0 && message->size() >= 12) {
    const auto length = static_cast<std::uint32_t>(message->size());
    std::memcpy(message->data() + 8, &length, sizeof(length));
  }
  if (r() % 16 != 0) repair_mac(message);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: wire_fuzz ROUNDS MESSAGE...\n");
    return 2;
  }
  std::vector<Bytes> corpus;
  for (int i = 2; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  std::mt19937_64 random(1);
  std::array<unsigned long, 16> verdicts{};
  const unsigned long rounds = std::strtoul(argv[1], nullptr, 10);
  for (unsigned long round = 0; round < rounds; ++round) {
    Bytes message = corpus[random() % corpus.size()];
    mutate(&message, &random);
    const std::unique_ptr<std::uint8_t[]> exact(new std::uint8_t[message.size()]);
    std::copy(message.begin(), message.end(), exact.get());
    wire::Prelude prelude;
    Status status = wire::open(exact.get(), message.size(), fuzz_key(), &prelude);
    if (status.ok()) status = check_body(exact.get(), message.size(), prelude.type, &prelude);
    ++verdicts[static_cast<std::size_t>(status.code)];
    // A caller that forgets to open must not crash either.
    (void)check_body(exact.get(), message.size(), static_cast<wire::Type>(1 + random() % 13), nullptr);
  }
  std::printf("%lu messages: %lu valid, %lu malformed, %lu unsupported, %lu with a bad MAC\n", rounds,
              verdicts[static_cast<std::size_t>(Code::kOk)], verdicts[static_cast<std::size_t>(Code::kMalformed)],
              verdicts[static_cast<std::size_t>(Code::kUnsupported)],
              verdicts[static_cast<std::size_t>(Code::kBadMac)]);
  return 0;
}
