"""One request on its way through a deployment."""

from __future__ import annotations

from math import nan
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hetkv.simulator.instance import Instance
    from hetkv.simulator.kv_links import Flow

FINISHED, REJECTED, FAILED = 0, 1, 2
STATUS_NAMES = ("finished", "rejected", "failed")


class Request:
    """Lengths are tokens, times simulated seconds (`nan` until they are known).

    `target` is how many tokens a prefill has to compute: the prompt, and after a preemption or a failure also the
    tokens generated so far. `computed` of them are in the KV cache of `home`. While a request decodes, its instance
    keeps its progress (`finish_step`); `generated` is brought up to date when it leaves.
    """

    __slots__ = (
        "arrival",
        "blocks",
        "cached",
        "computed",
        "decode_from",
        "finish_step",
        "first_token",
        "flows",
        "full_step",
        "generated",
        "granted",
        "hashes",
        "held",
        "home",
        "id",
        "last_token",
        "output",
        "peer",
        "peer_blocks",
        "peer_held",
        "phase",
        "preemptions",
        "prefilled",
        "prompt",
        "restarts",
        "run",
        "scheduled",
        "seeking",
        "sent",
        "target",
        "visible",
    )

    def __init__(
        self, id: int, arrival: float, prompt: int, output: int, hashes: tuple[int, ...] | None = None
    ) -> None:
        self.id = id
        self.arrival = arrival
        self.prompt = prompt
        self.output = output
        self.hashes = hashes  # one per full or partial block of the trace; equal hashes mean equal prefixes
        self.target = prompt
        self.computed = 0
        self.generated = 0
        self.cached = 0  # prompt tokens found in a prefix cache, at the first prefill
        self.blocks = 0  # KV blocks of its own on `home` (shared prefix blocks not counted)
        self.held: tuple[int, ...] = ()  # shared prefix blocks it holds on `home`
        self.phase = 0
        self.finish_step = 0
        self.full_step = 0  # of its decode batch: from then on its layers with a window take no more room
        self.run = 0  # counts residences in a decode batch; older entries of the finish heap are void
        self.home: Instance | None = None
        self.peer: Instance | None = None  # decode instance its KV is going to
        self.seeking = False  # a ticket of it waits for room
        self.granted = False  # `peer` has reserved `peer_blocks` for it, in addition to the prefix `peer_held`
        self.peer_blocks = 0
        self.peer_held: tuple[int, ...] = ()
        self.sent = 0  # leading tokens whose KV is on `peer` or on its way
        self.flows: list[Flow] = []
        self.preemptions = 0
        self.restarts = 0
        self.scheduled = nan  # first step with a token of it
        self.first_token = nan
        self.prefilled = nan  # last prompt token computed, on a prefill instance
        self.visible = nan  # KV complete at the decode instance
        self.decode_from = nan  # first decode step begins
        self.last_token = nan

    def forget(self) -> None:
        """Its KV cache on `home` is gone: everything so far, generated tokens too, has to be computed again."""
        self.target = self.prompt + self.generated
        self.computed = 0
        self.blocks = 0
        self.held = ()
        self.run += 1

    def forget_peer(self) -> None:
        """It has no destination any more."""
        self.peer = None
        self.seeking = False
        self.granted = False
        self.peer_blocks = 0
        self.peer_held = ()
        self.sent = 0
