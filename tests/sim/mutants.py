"""Faults that are planted into copies of the engine's sources, one switch each, for the simulator to find.

`python mutants.py CSRC OUT` writes the copies; `hetkv_sim_mutants --mutant NUMBER` turns one on. A fault is a piece of
source and what stands there instead; where the source has changed so that the piece is not found once, this fails and
names it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    """An expression where `old` is one, otherwise statements. With `MUTANT`, the text that replaces it as it is."""
    more: tuple[tuple[str, str], ...] = ()
    """Further pieces of the same file."""


RECEIVER, FRAMES, MESSAGES = "receiver.cpp", "receiver_frames.cpp", "receiver_messages.cpp"
REREADS = "receiver_rereads.cpp"
SENDER, BUNDLES, ANSWERS, ENDINGS = "sender.cpp", "sender_bundles.cpp", "sender_messages.cpp", "sender_endings.cpp"
ENGINE, LINKS = "engine.cpp", "engine_links.cpp"

# Left out, as they change nothing that this world shows: a slot's generation, which its link stands for while memory is
# the host's; late frames of a failed request, whose blocks are its own until it ends; a link closed while a pack of its
# sender stores, which goes to pages of its own; a link closed while an operation refers to it, as operations here end
# before a transport says that it is closed, and are seen first.
MUTANTS = [
    # What the receiver checks of a frame.
    Mutant("any epoch", RECEIVER, "request.epoch == epoch ? &request : nullptr", "&request"),
    Mutant("tokens outside the ticket", FRAMES,
           "frame.token_start < want.start || frame.token_stop > want.stop || frame.token_start >= frame.token_stop",
           "false"),
    Mutant("tokens that came before", FRAMES, "!part.seen[index].add({frame.token_start, frame.token_stop})", "false"),
    Mutant("slot of another link", FRAMES,
           "slot->link == link.id &&\n                    slot->generation == bundle",
           "(MUTANT || slot->link == link.id) &&\n                    slot->generation == bundle"),
    Mutant("request of another peer", FRAMES, "part.link.get() == &link; });",
           "MUTANT || part.link.get() == &link; });"),
    Mutant("checksum", FRAMES, "result.checksum != frame.checksum", "false"),
    Mutant("the pool is not compared", REREADS, "unpack.reread.frames[at].result.checksum != wanted", "false"),
    Mutant("the pool is compared before it is read", REREADS, "submit(unpack.reread, unpack);", "finish(unpack);"),
    # When it tells.
    Mutant("layer reported early", FRAMES, "missing -= tokens;", "missing -= std::min(missing, tokens + 1);"),
    Mutant("complete early", FRAMES, "if (all) tell_end(*request.outcome);", "tell_end(*request.outcome);"),
    Mutant("failed before the unpack has ended", MESSAGES, "request.unpacking > 0", "false"),
    Mutant("no lease", MESSAGES, "now > deadlines_.begin()->first", "false"),
    Mutant("no word of completion", FRAMES,
           "send(*part.link, prelude, wire::Done{part.frames, part.bytes});", ""),
    Mutant("no word of failure", MESSAGES, "part.link.get() != reporter && part.link->up() && !part.done", "false"),
    # Its slots.
    Mutant("slot freed before its unpack", FRAMES, "slot->state = SlotState::kFilled;", "give_back(bundle.slot);",
           (("give_back(unpack.slot);", ""),)),
    Mutant("slot never freed", MESSAGES, "slots_.free(slot);", ""),
    Mutant("slot of an empty bundle never freed", FRAMES,
           "return give_back(bundle.slot);", "return;"),
    Mutant("no quarantine", MESSAGES, "slots_.quarantine(link.id);", ""),
    Mutant("quarantine that ends at once", "slots.cpp", "slot.state = SlotState::kQuarantined;\n    ++quarantined_;",
           "slot.state = SlotState::kFree; ++free_;"),
    Mutant("a lost link's slot is in quarantine before its unpack has ended", "slots.cpp",
           "slot.link != link || slot.state != SlotState::kGranted",
           "slot.link != link || slot.state == SlotState::kFree"),
    Mutant("a lost link's slot is freed before its unpack has ended", MESSAGES, "slots_.retire_host(link.id);",
           "slots_.retire_host(link.id);\n"
           "    for (auto& unpack : unpacks_) {\n"
           "      if (unpack->holds_slot && slots_.at(unpack->slot)->link == link.id) free_slot(*unpack);\n"
           "    }"),
    Mutant("memory that another link has had", "slots.cpp", "(slot.link == link || !isolate_)",
           "(MUTANT || slot.link == link || !isolate_)"),
    Mutant("retired memory is used again", "slots.cpp", "slot.memory.reset();\n  ++slot.generation;", ""),
    Mutant("new memory of the same generation", "slots.cpp", "++slot.generation;", ""),
    Mutant("a wish for slots is not heard", MESSAGES, "demands_[link.id].hungry = true;", ""),
    Mutant("no recall", MESSAGES, "} else if (starved) {", "} else if (starved && !MUTANT) {"),
    Mutant("a slot granted after a recall is not recalled", MESSAGES,
           "demand.recalled = false;  // its answer", "if (!MUTANT) demand.recalled = false;  // its answer"),
    Mutant("a failed part still wants slots", MESSAGES, "if (part.remaining > 0) close_part(part);", ""),
    Mutant("released slots are not taken back", MESSAGES, "give_back(name.slot);", ""),
    # The sender.
    Mutant("commit before the put has ended", BUNDLES, "if (!bundle.put.done) {", "if (!MUTANT && !bundle.put.done) {"),
    Mutant("packed while packs are under way", ENDINGS, "if (lane.remaining > 0) return;",
           "if (lane.unsent > 0) return;",
           (("request.packing > 0 || request.lanes.empty()", "request.lanes.empty()"),)),
    Mutant("failed while packs are under way", ENDINGS, "if (!drained) {", "if (!MUTANT && !drained) {"),
    Mutant("a spent slot counts as granted", BUNDLES, "window.granted = false;", ""),
    Mutant("a slot that was not used is lost", BUNDLES, "windows_[link.id].free.push_back(bundle.slot);", ""),
    Mutant("a slot is used twice", BUNDLES, "windows.free.pop_back();", ""),
    Mutant("released slots count as granted", ANSWERS, "windows.slots[slot].granted = false;", ""),
    Mutant("a staging buffer is lost", BUNDLES,
           "staging_[where].push_back(std::move(bundle.staging));", ""),
    Mutant("a bundle used again counts as slow", BUNDLES, "owned->clear();",
           "const bool slow = owned->slow; owned->clear(); owned->slow = slow;"),
    Mutant("nobody waits for a staging buffer", BUNDLES, "queue.add(link.id);", ""),
    Mutant("no hold", ENDINGS, "now > deadlines_.begin()->first", "false"),
    Mutant("any content", ANSWERS, "ticket.content != request.content", "false"),
    Mutant("more tokens than there are", ANSWERS,
           "want[group].stop > have.stop || want[group].start < have.start", "false"),
    Mutant("tickets that wait are forgotten", SENDER,
           "for (const auto& ticket : tickets) take_ticket(submission.id, ticket);", ""),
    Mutant("a lost link fails nobody", ENDINGS,
           "lane.link.get() == &link && !lane.cancelled && !lane.delivered", "false"),
    Mutant("an abort is not read", ANSWERS,
           "if (lane.link.get() == &link && lane.epoch == prelude.epoch && !lane.cancelled) {\n      fail(",
           "if (!MUTANT && lane.link.get() == &link && lane.epoch == prelude.epoch && !lane.cancelled) {\n      fail("),
    Mutant("idle slots are kept", ANSWERS,
           "windows.open == 0 && windows.tickets == 0 && !windows.free.empty()", "false"),
    Mutant("anybody's abort", MESSAGES, "request != nullptr && part_of(*request, link) != nullptr",
           "request != nullptr"),
    # Links.
    Mutant("any sequence", ENGINE, "prelude.sequence != at->receive_sequence", "false"),
    Mutant("silence is not noticed", LINKS, "now > at.heard_ns && now - at.heard_ns > patience", "false"),
    Mutant("no heartbeats", LINKS, "now - at.sent_ns >= config_.heartbeat_ms * kMs && now > at.sent_ns", "false"),
    Mutant("messages after the end count", ENGINE, "if (at->state == LinkState::kDraining) return;", ""),
]  # fmt: skip


def plant(source: str, number: int, mutant: Mutant, old: str, new: str) -> str:
    """The source with a switch where the mutant's piece was."""
    if source.count(old) != 1:
        raise SystemExit(
            f"mutant {mutant.name!r}: its piece of csrc/engine/{mutant.file} is there {source.count(old)} times, not "
            f"once; adapt tests/sim/mutants.py to the source:\n{old}"
        )
    on = f"hetkv_mutant == {number}"
    if "MUTANT" in new:
        return source.replace(old, new.replace("MUTANT", f"({on})"))
    if old.endswith(";"):
        return source.replace(old, f"if ({on}) {{ {new} }} else {{ {old} }}")
    return source.replace(old, f"({on} ? ({new}) : ({old}))")


def main(csrc: Path, out: Path) -> None:
    """Copies of all sources of the engine, with the mutants."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {path.name: path.read_text() for path in (csrc / "engine").glob("*.cpp")}
    for number, mutant in enumerate(MUTANTS, 1):
        for old, new in ((mutant.old, mutant.new), *mutant.more):
            texts[mutant.file] = plant(texts[mutant.file], number, mutant, old, new)
    for name, text in texts.items():
        made = "extern int hetkv_mutant;\n" + text
        path = out / name
        if not path.exists() or path.read_text() != made:
            path.write_text(made)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
