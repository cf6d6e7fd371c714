// What the C library's rules (csrc/control) say of two descriptions, for comparison with Python's (tests/capi).
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

#include "control/agreement.h"
#include "control/messages.h"

namespace {

using namespace hetkv::control;

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

std::string list(const std::vector<double>& values) {
  std::string out = "[";
  for (const double value : values) {
    char text[32];
    std::snprintf(text, sizeof text, "%.17g", value);
    out += (out.size() > 1 ? "," : "") + std::string(text);
  }
  return out + "]";
}

}  // namespace

// Bytes of the JSON text, cut where `room` is less. Of two messages `description`, this side's first.
extern "C" std::size_t agree(const std::uint8_t* mine, std::size_t mine_bytes, const std::uint8_t* theirs,
                             std::size_t theirs_bytes, char* out, std::size_t room) {
  Message a, b;
  std::string text;
  hetkv::Status status = decode(mine, mine_bytes, &a);
  if (status.ok()) status = decode(theirs, theirs_bytes, &b);
  if (!status.ok()) {
    text = "{\"malformed\":" + quoted(status.detail) + "}";
  } else {
    // Encoded and decoded again, so that both directions are compared.
    const Bytes again = encode(a.description);
    status = decode(again.data(), again.size(), &a);
    Agreement agreement;
    const Incompatible found = agree(a.description, b.description, &agreement);
    if (found.found()) {
      text = "{\"field\":" + quoted(found.field) + ",\"mine\":" + quoted(found.mine) +
             ",\"theirs\":" + quoted(found.theirs) + ",\"why\":" + quoted(found.why) + "}";
    } else {
      text = "{\"layers\":[";
      for (const LayerRoute& at : agreement.layers) {
        text += (text.back() == '[' ? "[" : ",[") + std::to_string(at.layer) + "," + std::to_string(at.heads.start) +
                "," + std::to_string(at.heads.stop);
        for (const Conversion& how : at.conversions) {
          text += ",[" + quoted(name_of(how.wire)) + "," + list(how.pack) + "," + list(how.unpack) + "]";
        }
        text += "]";
      }
      text += "],\"ranks\":[";
      for (const std::int64_t rank : agreement.ranks) text += (text.back() == '[' ? "" : ",") + std::to_string(rank);
      text += "]}";
    }
  }
  std::memcpy(out, text.data(), std::min(room, text.size()));
  return text.size();
}
