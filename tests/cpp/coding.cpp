// A link and a coder of given rates, in virtual time, and what CodingChoice makes of them: one line a phase, the share
// of bytes that were coded and what got through against no coding at all.
//
// usage: coding LINK CODER RATIO RECEIVER ... (bytes a second; RECEIVER bounds plain bytes, 0: nothing does), one or
// more phases of 20 s of virtual time
#include "transport/coding.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

int main(int count, char** arguments) {
  using hetkv::transport::CodingChoice;
  CodingChoice choice;
  hetkv::transport::LinkUse use;
  double acked = 0;
  double now = 0;
  for (int at = 1; at + 3 < count; at += 4) {
    const double link = std::atof(arguments[at]);
    const double coder = std::atof(arguments[at + 1]);
    const double ratio = std::atof(arguments[at + 2]);
    const double receiver = std::atof(arguments[at + 3]);
    double plain = 0;
    double coded = 0;
    const double end = now + 20;
    const double begin = now;
    while (now < end) {
      constexpr double kBytes = 256 * 1024;
      const bool codes = choice.coded();
      const double wire = codes ? kBytes / ratio : kBytes;
      const double sent = wire / link;
      const double made = codes ? kBytes / coder : 0;
      const double taken = receiver > 0 ? kBytes / receiver * (codes ? 1.5 : 1) : 0;
      const double busy = std::max(sent, taken);
      const double took = std::max(busy, made);
      if (codes) {
        for (int part = 0; part < 4; ++part) {
          choice.on_part(65536, static_cast<std::size_t>(65536 / ratio), static_cast<std::uint64_t>(made / 4 * 1e9));
        }
      }
      now += took;
      acked += wire;
      plain += kBytes;
      coded += codes ? kBytes : 0;
      use.acked_bytes = static_cast<std::uint64_t>(acked);
      use.busy_ns += static_cast<std::uint64_t>(busy * 1e9);
      use.pending_ns = static_cast<std::uint64_t>(now * 1e9);
      choice.on_use(use);
    }
    const double without = receiver > 0 ? std::min(link, receiver) : link;
    std::printf("%.3f %.3f\n", coded / plain, plain / (now - begin) / without);
  }
  return 0;
}
