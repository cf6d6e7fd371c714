#include "transport/link_coder.h"

namespace hetkv::transport {

bool LinkCoder::code(const std::uint8_t* data, std::size_t bytes, std::vector<std::uint8_t>* out) {
  if (!codes()) return false;
  const std::uint64_t begin = clock_.now_ns();
  const bool coded = encoder_.encode(coding_.values, data, bytes, out);
  choice_.on_part(bytes, coded ? out->size() : bytes, clock_.now_ns() - begin);
  return coded;
}

void LinkCoder::on_pending(bool any) {
  if (any == pending_) return;
  pending_ = any;
  const std::uint64_t now = clock_.now_ns();
  if (!any) pending_ns_ += now - since_ns_;
  since_ns_ = now;
}

}  // namespace hetkv::transport
