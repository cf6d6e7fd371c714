// UTF-8 as Unicode's table 3-7 defines it: no overlong forms, no surrogates, nothing above U+10FFFF.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace hetkv::wire {

// Index of the first byte that does not begin or complete a well-formed sequence (the sequence's first byte), or
// text.size() where all of it is well formed.
std::size_t utf8_error(std::string_view text);

// `text` with malformed bytes replaced by '?', cut before the first character that would end after `max_bytes`.
std::string utf8_prefix(std::string_view text, std::size_t max_bytes);

}  // namespace hetkv::wire
