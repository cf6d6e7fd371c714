// Hashes request ids, which routers and their clients choose: keyed, so that nobody can make them meet.
#pragma once

#include <algorithm>
#include <cstddef>
#include <random>

#include "wire/message.h"
#include "wire/siphash.h"

namespace hetkv::engine {

struct IdHash {
  std::size_t operator()(const wire::RequestId& id) const {
    static const wire::SipKey key = [] {
      std::random_device source;
      wire::SipKey made;
      std::generate(made.begin(), made.end(), [&] { return static_cast<std::uint8_t>(source()); });
      return made;
    }();
    return wire::siphash24(key, id.data(), id.size());
  }
};

}  // namespace hetkv::engine
