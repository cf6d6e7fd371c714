// Fuzzer of the wire's messages: frames, bundles with their records, tickets, grants and all others, with the MAC that
// a peer with the key would put under them.
#include "wire_check.h"

namespace {

using namespace hetkv;

void check(const Bytes& message) {
  wire::Prelude prelude;
  const Status status = wire::open(message.data(), message.size(), fuzz_key(), &prelude);
  if (status.ok()) static_cast<void>(check_body(message.data(), message.size(), prelude.type, &prelude));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  wire::Prelude prelude;
  static_cast<void>(wire::open(data, size, fuzz_key(), &prelude));
  // A caller that forgets to open must not crash either.
  for (int type = 1; type <= 13; ++type) {
    static_cast<void>(check_body(data, size, static_cast<wire::Type>(type), nullptr));
  }
  Bytes message(data, data + size);
  repair_mac(&message);
  check(message);
  if (message.size() < 20) return 0;
  const auto length = static_cast<std::uint32_t>(message.size());
  std::memcpy(message.data() + 8, &length, sizeof length);
  repair_mac(&message);
  check(message);
  return 0;
}
