// Links that wait for one of a few things that all links of a sender share, in the order in which they began to.
// Whoever asks often, as a busy link does, overtakes none that asked before. Progress thread only.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>

namespace hetkv::engine {

class WaitingLinks {
 public:
  // How many wait before the link; all where it does not wait.
  std::size_t before(std::uint32_t link) const {
    return static_cast<std::size_t>(std::find(links_.begin(), links_.end(), link) - links_.begin());
  }
  void add(std::uint32_t link) {
    if (before(link) == links_.size()) links_.push_back(link);
  }
  // Whether it waited.
  bool remove(std::uint32_t link) {
    const auto found = std::find(links_.begin(), links_.end(), link);
    if (found == links_.end()) return false;
    links_.erase(found);
    return true;
  }
  const std::deque<std::uint32_t>& in_order() const { return links_; }

 private:
  std::deque<std::uint32_t> links_;
};

}  // namespace hetkv::engine
