#include "control/routes.h"

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <tuple>

namespace hetkv::control {
namespace {

using Holders = std::vector<std::int64_t>;  // sources that hold the same heads

struct Piece {
  std::int64_t destination = 0;
  std::int64_t layer = 0;
  Interval heads;
};

// Heads that one source gives one destination, by layer.
using Given = std::map<std::int64_t, std::vector<Interval>>;

std::int64_t head_elements(const Spec& spec, std::int64_t layer) {
  std::int64_t sum = 0;
  for (const Segment& segment : spec.layers[static_cast<std::size_t>(layer)].segments) sum += segment.channels;
  return sum;
}

// `wanted` in pieces that are each held by one set of sources.
std::vector<std::pair<Interval, Holders>> cut(const Interval& wanted,
                                              const std::vector<std::pair<std::int64_t, Interval>>& held) {
  std::set<std::int64_t> edges{wanted.start, wanted.stop};
  std::vector<std::pair<std::int64_t, Interval>> inside;
  for (const auto& [source, heads] : held) {
    inside.emplace_back(source, intersect(heads, wanted));
    if (inside.back().second.size() > 0) edges.insert({inside.back().second.start, inside.back().second.stop});
  }
  std::vector<std::pair<Interval, Holders>> out;
  for (auto first = edges.begin(), next = std::next(first); next != edges.end(); ++first, ++next) {
    Holders holders;
    for (const auto& [source, heads] : inside) {
      if (heads.start <= *first && *next <= heads.stop) holders.push_back(source);
    }
    out.emplace_back(Interval{*first, *next}, std::move(holders));
  }
  return out;
}

// Deals pieces to their holders: one run of single heads each, by the middle of each head's elements. Ordered by
// destination, head, layer: a run keeps to few destinations, and covers whole heads before it cuts layers.
void share(const Spec& spec, const Holders& holders, const std::vector<Piece>& pieces,
           std::map<std::pair<std::int64_t, std::int64_t>, Given>* given) {
  if (holders.size() == 1) {
    for (const Piece& piece : pieces) {
      (*given)[{piece.destination, holders[0]}][piece.layer].push_back(piece.heads);
    }
    return;
  }
  std::vector<std::tuple<std::int64_t, std::int64_t, std::int64_t>> units;
  std::int64_t total = 0;
  for (const Piece& piece : pieces) {
    for (std::int64_t head = piece.heads.start; head < piece.heads.stop; ++head) {
      units.emplace_back(piece.destination, head, piece.layer);
      total += head_elements(spec, piece.layer);
    }
  }
  std::sort(units.begin(), units.end());
  std::int64_t before = 0;
  for (const auto& [destination, head, layer] : units) {
    const std::int64_t size = head_elements(spec, layer);
    const std::int64_t at = (2 * before + size) * static_cast<std::int64_t>(holders.size()) / (2 * total);
    (*given)[{destination, holders[static_cast<std::size_t>(at)]}][layer].push_back({head, head + 1});
    before += size;
  }
}

std::set<Interval> merge(std::vector<Interval> intervals) {
  std::sort(intervals.begin(), intervals.end());
  std::vector<Interval> merged;
  for (const Interval& interval : intervals) {
    if (!merged.empty() && merged.back().stop == interval.start) {
      merged.back().stop = interval.stop;
    } else {
      merged.push_back(interval);
    }
  }
  return {merged.begin(), merged.end()};
}

// Touching heads of a layer as one, then consecutive layers with the same heads.
std::vector<std::pair<Interval, Interval>> rectangles(const Given& given) {
  std::map<Interval, std::int64_t> open;
  std::vector<std::pair<Interval, Interval>> done;
  std::int64_t last = -1;
  for (const auto& [layer, parts] : given) {
    const std::set<Interval> merged = merge(parts);
    for (auto run = open.begin(); run != open.end();) {
      if (merged.count(run->first) == 0 || layer != last + 1) {
        done.emplace_back(Interval{run->second, last + 1}, run->first);
        run = open.erase(run);
      } else {
        ++run;
      }
    }
    for (const Interval& heads : merged) open.emplace(heads, layer);
    last = layer;
  }
  for (const auto& [heads, first] : open) done.emplace_back(Interval{first, last + 1}, heads);
  std::sort(done.begin(), done.end());
  return done;
}

}  // namespace

std::vector<std::pair<std::int64_t, Interval>> overlap(const Spec& spec, const Shard& a, const Shard& b) {
  std::vector<std::pair<std::int64_t, Interval>> out;
  const Interval layers = intersect(a.layers, b.layers);
  for (std::int64_t layer = layers.start; layer < layers.stop; ++layer) {
    const auto at = static_cast<std::size_t>(layer);
    const Interval heads = intersect(a.heads[at], b.heads[at]);
    if (heads.size() > 0 && !spec.layers[at].shares) out.emplace_back(layer, heads);
  }
  return out;
}

Status routes(const Spec& spec, const std::vector<Shard>& sources, const std::vector<Shard>& destinations,
              std::vector<Route>* out) {
  std::map<Holders, std::vector<Piece>> pieces;
  for (std::size_t index = 0; index < destinations.size(); ++index) {
    const Shard& destination = destinations[index];
    for (std::int64_t layer = destination.layers.start; layer < destination.layers.stop; ++layer) {
      const auto at = static_cast<std::size_t>(layer);
      if (spec.layers[at].shares) continue;
      std::vector<std::pair<std::int64_t, Interval>> held;
      for (std::size_t source = 0; source < sources.size(); ++source) {
        if (sources[source].layers.holds(layer)) held.emplace_back(source, sources[source].heads[at]);
      }
      for (auto& [heads, holders] : cut(destination.heads[at], held)) {
        if (holders.empty()) {
          return Status::error(Code::kInvalid, "layer " + std::to_string(layer) + ", heads [" +
                                                   std::to_string(heads.start) + ", " + std::to_string(heads.stop) +
                                                   "): destination " + std::to_string(index) +
                                                   " needs them, no source holds them");
        }
        pieces[holders].push_back({static_cast<std::int64_t>(index), layer, heads});
      }
    }
  }
  std::map<std::pair<std::int64_t, std::int64_t>, Given> given;  // (destination, source)
  for (const auto& [holders, of] : pieces) share(spec, holders, of, &given);
  out->clear();
  for (const auto& [pair, layers] : given) {
    for (const auto& [run, heads] : rectangles(layers)) out->push_back({pair.second, pair.first, run, heads});
  }
  return {};
}

}  // namespace hetkv::control
