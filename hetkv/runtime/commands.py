"""What an instance's engine receives (`Command`) and sends (`Report`). They travel as MessagePack, too."""

from __future__ import annotations

import msgspec

from hetkv.runtime.sampling import Sampling, Token


class Compute(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Compute a prompt, and decode it: here, or on `goes_to` once its KV is there."""

    id: str
    """Never one that this instance had before: what it gave up may still have KV on its way."""
    tokens: list[int]
    """The prompt, and what was generated elsewhere since."""
    sampling: Sampling
    generated: int = 0
    goes_to: str = ""
    transfer: str = ""


class Expect(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Make room for a sequence that `source` computes, and take its KV."""

    id: str
    tokens: list[int]
    sampling: Sampling
    source: str
    transfer: str
    generated: int = 0


class Begin(msgspec.Struct, frozen=True, tag=True):
    """The token that the source chose for an expected sequence: decode it once its KV is here."""

    id: str
    token: int


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Give a sequence up, whatever it is doing. Nothing more is reported of it."""

    id: str
    reason: str = "aborted"


class Link(msgspec.Struct, frozen=True, tag=True):
    """Link to an instance that KV may come from. Answered by `Linked`."""

    name: str
    addresses: tuple[str, ...]


class Reset(msgspec.Struct, frozen=True, tag=True):
    """Give everything up, and tell which prefixes are cached. Answered by a report with `reset`."""


Command = Compute | Expect | Begin | Abort | Link | Reset


class Output(msgspec.Struct, frozen=True, array_like=True):
    """A sequence has a new token. `finish`: why it was the last one (`stop`, `length`), or empty."""

    id: str
    token: Token
    finish: str = ""


class Linked(msgspec.Struct, frozen=True, array_like=True):
    """What became of a `Link`: empty, or why not."""

    name: str
    error: str = ""
    final: bool = False
    """Another attempt would end in the same way: the two sides do not fit, or one does not let the other in."""


class Load(msgspec.Struct, frozen=True, array_like=True):
    """How an instance is doing."""

    waiting: int
    """Prompts in line, preempted ones too."""
    running: int
    """Sequences in the batch."""
    incoming: int
    """Sequences whose KV is expected, on its way, or waits for a place."""
    holding: int
    """Sequences whose KV has not been read by the instance that decodes them."""
    prompt_tokens: int
    """Left to compute."""
    free_blocks: int
    preemptions: int
    steps: int
    computed_tokens: int
    """Prompt tokens since the start, recomputed ones too."""
    busy_s: float
    """Time in steps since the start."""
    prompt_token_s: float
    """Seconds that a prompt token takes, lately."""


class Report(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """What happened since the last one."""

    load: Load
    outputs: list[Output] = []
    failed: dict[str, str] = {}
    """Sequences that this instance lost, and why: they have to be computed again."""
    arrived: list[str] = []
    """Sequences whose KV is complete here."""
    linked: list[Linked] = []
    progress: dict[str, int] = {}
    """Tokens of prompts computed so far, of those that made some in this step."""
    came: list[int] = []
    gone: list[int] = []
    """Hashes of prefixes that the cache has got and lost; after a `reset`: all that it has."""
    reset: bool = False
    error: str = ""
    """Why the engine has ended."""
