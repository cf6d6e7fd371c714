// The receiver's unpacks, and with `verify_bytes` what is read again of the pool after each.
#include <algorithm>
#include <string>
#include <utility>

#include "engine/receiver.h"

namespace hetkv::engine {

void Receiver::submit(RemapTask& task, Unpack& unpack) {
  task.owner = &unpack;
  mover_->submit(&task);
  if (task.done) go_on(task);
}

// A task of the unpack has ended: the next one begins, or it is over. None begins once all its requests have failed, as
// they have when the engine stops and waits for the last ones.
void Receiver::go_on(RemapTask& task) {
  Unpack& unpack = *static_cast<Unpack*>(task.owner);
  const bool wanted = std::any_of(unpack.pieces.begin(), unpack.pieces.end(),
                                  [](const Piece& piece) { return piece.request->failure.ok(); });
  if (config_.verify_bytes == 0 || &task == &unpack.reread || !task.status.ok() || !wanted) return finish(unpack);
  if (&task == &unpack.task) {
    unpack.reread.status = plan_reread(unpack);
    if (!unpack.reread.status.ok()) return finish(unpack);
    if (!unpack.expected.frames.empty()) return submit(unpack.expected, unpack);
  }
  free_slot(unpack);  // nothing reads the payload any more
  grant();
  submit(unpack.reread, unpack);
}

// What has to be read again, and what it is compared with.
Status Receiver::plan_reread(Unpack& unpack) {
  std::uint64_t bytes = 0;
  for (const Piece& piece : unpack.pieces) {
    bytes += reread_bytes(*piece.plan, piece.record.frame.token_stop - piece.record.frame.token_start);
  }
  std::uint64_t at = 0;
  if (Status status = scratch(bytes, &at); !status.ok()) return status;
  const std::uint64_t slot = slots_.at(unpack.slot)->memory->local();
  for (Piece& piece : unpack.pieces) {
    const wire::Record& record = piece.record;
    const BlockTable& blocks = piece.request->blocks[piece.plan->group];
    add_reread(*piece.plan, blocks, record, at, &unpack.reread);
    if (!unpacks_exactly(*piece.plan)) {
      piece.expected = unpack.expected.frames.size();
      add_expected(*piece.plan, blocks, record, slot + record.payload_offset, at, &unpack.expected);
    }
    at += reread_bytes(*piece.plan, record.frame.token_stop - record.frame.token_start);
  }
  return {};
}

// Memory that the mover can write. Tasks in flight share it: each is summed while its values are moved.
Status Receiver::scratch(std::uint64_t bytes, std::uint64_t* address) {
  if (bytes > config_.verify_bytes) {
    return Status::error(Code::kUnsupported, "verifying the pool takes " + std::to_string(bytes) +
                                                 " bytes of scratch memory here, there are " +
                                                 std::to_string(config_.verify_bytes));
  }
  if (device_scratch_ != nullptr) {
    *address = device_scratch_->address();
    return {};
  }
  if (scratch_ == nullptr) {
    auto status = OwnWindow::make(*transport_, nullptr, Where::kHost, config_.verify_bytes, &scratch_);
    if (!status.ok()) return status;
  }
  *address = scratch_->local();
  return {};
}

bool Receiver::pool_differs(const Unpack& unpack, std::size_t at) const {
  const Piece& piece = unpack.pieces[at];
  const std::uint64_t wanted =
      piece.expected == kExact ? piece.record.frame.checksum : unpack.expected.frames[piece.expected].result.checksum;
  return unpack.reread.frames[at].result.checksum != wanted;
}

}  // namespace hetkv::engine
