// What must be so inside an engine after each of its turns: credits, slots and counts are conserved.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>

#include "engine/receiver.h"
#include "engine/sender.h"

namespace hetkv::engine {

struct Inspect {
  // Empty, or what is wrong.
  static std::string check(const Sender& sender);
  static std::string check(const Receiver& receiver);
  // Nothing is held: no request, ticket, slot or buffer.
  static std::string at_rest(const Sender& sender);
  static std::string at_rest(const Receiver& receiver);
  // Slots of a link, as each side knows them: equal where no message of the link is on its way.
  static std::set<std::pair<std::uint32_t, std::uint32_t>> held(const Sender& sender, std::uint32_t link);
  static std::set<std::pair<std::uint32_t, std::uint32_t>> granted(const Receiver& receiver, std::uint32_t link);
  // Where the address is in a slot: the link that may write there; 0 where none may. Nothing where it is in no slot.
  static std::optional<std::uint32_t> writer(const Receiver& receiver, std::uint64_t address);
  // Where the address is in a slot that is granted or being unpacked: its link; 0 where it is not.
  static std::uint32_t user(const Receiver& receiver, std::uint64_t address);
  // The sender has slots of the link and nothing to fill them with.
  static bool idle(const Sender& sender, std::uint32_t link);
  // Some link has work and no slot, none is free, and this link holds more than its share.
  static bool over_share(const Receiver& receiver, std::uint32_t link);
  // Flips a bit of some slot that is in use.
  static void flip(Receiver& receiver, std::uint64_t random);
  static bool up(const Engine& engine, std::uint32_t link);
  static bool settled(const Engine& engine);  // nothing is posted or has come that no turn has seen

 private:
  static const Slot* at(const Receiver& receiver, std::uint64_t address);
};

}  // namespace hetkv::engine
