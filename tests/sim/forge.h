// A peer that has the keys and does not keep the rules: it may spoil its own requests and its own links, and nothing
// else.
#pragma once

#include "transfers.h"

namespace hetkv::sim {

// Sends one forged message over some link; false: there was nothing to forge.
bool forge(Fleet& fleet, const Transfers& transfers);

}  // namespace hetkv::sim
