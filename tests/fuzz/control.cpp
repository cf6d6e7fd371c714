// Fuzzer of the control channel's messages (MessagePack), and of what two descriptions agree on.
//
// Input: the length of the first message in 2 bytes, the first message, the second one.
#include <algorithm>
#include <cstdlib>

#include "control/agreement.h"
#include "control/messages.h"

namespace {

using namespace hetkv::control;

void require(bool holds) {
  if (!holds) std::abort();
}

bool read(const std::uint8_t* data, std::size_t size, Message* out) {
  if (!decode(data, size, out).ok()) return false;
  if (out->kind != MessageKind::kDescription) return false;
  require(out->description.check().ok());
  const Bytes once = encode(out->description);
  Message again;
  require(decode(once.data(), once.size(), &again).ok());
  require(encode(again.description) == once);
  return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) return 0;
  const std::size_t first = std::min<std::size_t>(data[0] | data[1] << 8, size - 2);
  Message a, b;
  const bool both =
      static_cast<int>(read(data + 2, first, &a)) + static_cast<int>(read(data + 2 + first, size - 2 - first, &b)) == 2;
  if (!both || a.description.role == b.description.role) return 0;
  Agreement forth, back;
  const Incompatible mine = agree(a.description, b.description, &forth);
  const Incompatible theirs = agree(b.description, a.description, &back);
  require(mine.found() == theirs.found());
  if (!mine.found()) require(forth.layers.size() == back.layers.size());
  return 0;
}
