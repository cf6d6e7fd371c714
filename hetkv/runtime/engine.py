"""One serving instance: `Engine`, continuous batching over its ranks, with KV that comes from and goes to others.

    engine = Engine(ranks, Limits(), on_report=queue.put)
    engine.submit(Compute("a", prompt, Sampling(max_tokens=20)))                # compute and decode here
    engine.submit(Compute("b", prompt, sampling, goes_to="decode-0", transfer="b/0"))     # compute here, decode there
    engine.submit(Expect("c", prompt, sampling, source="prefill-0", transfer="c/0"))      # computed there ...
    engine.submit(Begin("c", token))                                            # ... with this first token

An engine has no role: what it is asked for makes it one that prefills, one that decodes, or both. One thread runs it;
`submit` may be called from any. What happened is in one `Report` a step.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from hetkv.errors import AuthenticationError, HandshakeError, HetkvError
from hetkv.runtime.batching import Batching, Chunk, Limits
from hetkv.runtime.block_manager import BlockManager, prefix_hashes
from hetkv.runtime.commands import Abort, Begin, Command, Compute, Expect, Link, Linked, Load, Output, Report, Reset
from hetkv.runtime.rank import Announce, Event, Order, Piece, Receive
from hetkv.runtime.sampling import Draw, Token
from hetkv.runtime.sequence import Sequence
from hetkv.runtime.step_log import StepLog
from hetkv.transport.content import content_digest
from hetkv.transport.instance import Instance

IDLE_REPORT_S = 0.5
"""How often an engine with nothing to do says so."""
SMOOTHING = 0.2
"""Weight of the latest step in the average of prompt seconds."""


class Ranks(Protocol):
    """The ranks of the instance: one in this process, or several in processes of their own."""

    def start(self, on_event: Callable[[int, Event], None]) -> None:
        """Bring them up. Events come with the rank's number, from other threads."""

    def work(self, order: Order) -> list[Token]:
        """The same order for all ranks; the tokens that they chose."""

    def link(self, source: Instance) -> None:
        """Link every rank to those of `source` that matter to it."""

    @property
    def count(self) -> int: ...

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    def close(self) -> None: ...


class _Transfer:
    """KV of one sequence on its way: from here, or from `source`."""

    def __init__(self, name: str, sequence: Sequence, source: str = "") -> None:
        self.name, self.sequence, self.source = name, sequence, source
        self.packing = self.moving = 0
        """Ranks that still read its blocks, and on which it has not ended."""
        self.token: int | None = None
        self.error = ""
        self.done = self.given_up = False


class _News:
    """A `Report` in the making."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.failed: dict[str, str] = {}
        self.arrived: list[str] = []
        self.linked: list[Linked] = []
        self.progress: dict[str, int] = {}
        self.error = ""
        self.reset = False


class Engine:
    """See the module. `blocks` is the instance's pool; `on_report` is called in the engine's thread."""

    def __init__(
        self,
        ranks: Ranks,
        blocks: BlockManager,
        limits: Limits,
        on_report: Callable[[Report], None],
        log: StepLog | None = None,
    ) -> None:
        self.batching = Batching(blocks, limits)
        self._ranks, self._blocks, self._on_report, self._log = ranks, blocks, on_report, log
        self._eos = frozenset(ranks.eos_ids)
        self._inbox: queue.SimpleQueue[Command | tuple[int, Event] | Linked | None] = queue.SimpleQueue()
        self._sequences: dict[str, Sequence] = {}
        self._transfers: dict[str, _Transfer] = {}
        self._of: dict[str, _Transfer] = {}  # by sequence
        self._known_blocks: dict[str, int] = {}  # blocks of a sequence that the ranks know
        self._forget: list[str] = []
        self._abort: dict[str, str] = {}
        self._announce: list[Announce] = []
        self._news = _News()
        self._steps = self._computed = 0
        self._busy_s = self._prompt_token_s = 0.0
        self._closing = self._computing = False
        self._thread = threading.Thread(target=self._run, name="hetkv-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._ranks.start(lambda rank, event: self._inbox.put((rank, event)))
        self._thread.start()

    def submit(self, command: Command) -> None:
        """Do this from the next step on."""
        self._inbox.put(command)

    def close(self) -> None:
        """End after the step that runs now; sequences are lost."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()
        self._ranks.close()

    # -- the loop

    def _run(self) -> None:
        try:
            while not self._closing:
                self._take_inbox()
                self._computing = self._step()
        except Exception as error:  # the instance is of no use any more, and its owner must hear it
            self._news.error = f"{type(error).__name__}: {error}"
            self._report()

    def _take_inbox(self) -> None:
        """All that has come. Where the last step computed nothing, the next one can only after a message."""
        try:
            message = self._inbox.get(block=not self._computing, timeout=IDLE_REPORT_S)
            if self._log is not None and not self._computing:
                self._log.begin()
            while True:
                self._take(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def _take(self, message: Any) -> None:
        if message is None:
            self._closing = True
        elif isinstance(message, tuple):
            self._on_event(message[1])
        elif isinstance(message, Linked):
            self._news.linked.append(message)
        elif isinstance(message, Link):
            threading.Thread(target=self._link, args=(message,), daemon=True).start()
        elif isinstance(message, Compute):
            self._on_compute(message)
        elif isinstance(message, Expect):
            self._on_expect(message)
        elif isinstance(message, Begin):
            transfer = self._of.get(message.id)
            if transfer is not None:
                transfer.token = message.token
                self._deliver(transfer)
        elif isinstance(message, Abort):
            self._on_abort(message)
        elif isinstance(message, Reset):
            for name in list(self._sequences):
                self._on_abort(Abort(name, "the scheduler has changed"))
            self._news.reset = True

    def _step(self) -> bool:
        """Do all that can be done now; whether anything was computed."""
        granted = [self._ticket(sequence) for sequence in self.batching.grant()]
        chunks = self.batching.plan()
        for name in [name for name in self._known_blocks if not self._sequences[name].blocks]:
            self._gone(name)  # preempted
        pieces = [self._piece(chunk) for chunk in chunks]
        order = Order(
            forget=self._forget, announce=self._announce, receive=granted, abort=self._abort, pieces=pieces
        )  # fmt: skip
        self._forget, self._announce, self._abort = [], [], {}
        prompts = [(c.start, c.stop) for c in chunks if c.sequence.id in self.batching.prefilling]
        decodes = [c.start for c in chunks if c.sequence.id in self.batching.decoding]
        start = time.monotonic()
        tokens = self._ranks.work(order) if order != Order() else []
        if chunks:
            self._count(chunks, time.monotonic() - start)
            for sequence, token in zip(self.batching.advance(chunks), tokens, strict=True):
                self._chosen(sequence, token)
        self._report()
        if chunks and self._log is not None:
            self._log.end(decodes, prompts)
        return bool(chunks)

    def _count(self, chunks: list[Chunk], seconds: float) -> None:
        self._steps += 1
        self._busy_s += seconds
        prompts = 0
        for sequence, start, stop in chunks:
            if sequence.id in self.batching.prefilling:
                prompts += stop - start
                self._news.progress[sequence.id] = stop
        self._computed += prompts
        if prompts:
            latest = seconds / prompts
            self._prompt_token_s += SMOOTHING * (latest - self._prompt_token_s) if self._prompt_token_s else latest

    def _chosen(self, sequence: Sequence, token: Token) -> None:
        """A sequence's next token is known."""
        sequence.generated += 1
        finish = self._finish(sequence, token.id)
        self._news.outputs.append(Output(sequence.id, token, finish))
        if sequence.goes_to:
            transfer = self._of[sequence.id]
            if finish:
                self._abort[transfer.name] = "the answer is complete"
            self._released(transfer)
            return
        sequence.tokens.append(token.id)
        if finish:
            self._end(sequence)

    def _finish(self, sequence: Sequence, token: int) -> str:
        if token in self._eos and not sequence.sampling.ignore_eos:
            return "stop"
        return "length" if sequence.generated >= sequence.sampling.max_tokens else ""

    def _end(self, sequence: Sequence) -> None:
        """A sequence leaves; what it computed stays in the prefix cache as long as there is room."""
        if self._blocks.unit and sequence.computed == len(sequence.tokens) - 1:
            sequence.hashes = prefix_hashes(sequence.tokens[: sequence.computed], self._blocks.unit)
            self.batching.share(sequence)
        self.batching.end(sequence)
        del self._sequences[sequence.id]
        self._gone(sequence.id)

    def _gone(self, name: str) -> None:
        """The ranks forget a sequence's blocks."""
        if self._known_blocks.pop(name, None) is not None:
            self._forget.append(name)

    def _piece(self, chunk: Chunk) -> Piece:
        sequence, start, stop = chunk
        known = self._known_blocks.get(sequence.id, 0)
        if sequence.goes_to and not known:
            self._announced(sequence)
        self._known_blocks[sequence.id] = len(sequence.blocks)
        return Piece(
            id=sequence.id, start=start, tokens=sequence.tokens[start:stop], blocks=sequence.blocks[known:],
            fresh=known == 0, draw=Draw(sequence.sampling, sequence.generated) if chunk.last else None,
            transfer=self._of[sequence.id].name if sequence.goes_to else "",
        )  # fmt: skip

    # -- KV that comes and goes

    def _on_compute(self, command: Compute) -> None:
        hashes = prefix_hashes(command.tokens, self._blocks.unit)
        sequence = Sequence(
            command.id, command.tokens, command.sampling, generated=command.generated, hashes=hashes,
            goes_to=command.goes_to,
        )  # fmt: skip
        if self._fits(sequence):
            self._sequences[sequence.id] = sequence
            if command.goes_to:
                self._of[sequence.id] = _Transfer(command.transfer, sequence)
            self.batching.waiting.append(sequence)

    def _on_expect(self, command: Expect) -> None:
        hashes = prefix_hashes(command.tokens, self._blocks.unit)
        sequence = Sequence(
            command.id, command.tokens, command.sampling, generated=command.generated, hashes=hashes
        )  # fmt: skip
        if self._fits(sequence):
            self._sequences[sequence.id] = sequence
            self._of[sequence.id] = _Transfer(command.transfer, sequence, command.source)
            self.batching.expected.append(sequence)

    def _fits(self, sequence: Sequence) -> bool:
        """Whether the pool could hold it, alone. What could not is lost at once, and so is a name that is in use."""
        if sequence.id in self._sequences:
            self._news.failed[sequence.id] = "a sequence of this name is still here"
            return False
        here = 0 if sequence.goes_to else sequence.sampling.max_tokens - sequence.generated - 1
        need = self._blocks.blocks_of(len(sequence.tokens) + here)
        if need > self._blocks.total:
            self._news.failed[sequence.id] = f"{need} blocks are needed, the pool has {self._blocks.total}"
        return need <= self._blocks.total

    def _announced(self, sequence: Sequence) -> None:
        """A prompt whose KV goes elsewhere has got its blocks."""
        transfer = self._open(sequence)
        content = content_digest(sequence.tokens)
        self._announce.append(Announce(transfer.name, sequence.blocks, len(sequence.tokens), content))

    def _ticket(self, sequence: Sequence) -> Receive:
        """An expected sequence has got its blocks."""
        transfer = self._open(sequence)
        content = content_digest(sequence.tokens)
        return Receive(
            transfer.name, transfer.source, sequence.blocks, len(sequence.tokens), sequence.start, content
        )  # fmt: skip

    def _open(self, sequence: Sequence) -> _Transfer:
        transfer = self._of[sequence.id]
        transfer.packing = transfer.moving = self._ranks.count
        self._transfers[transfer.name] = transfer
        return transfer

    def _on_event(self, event: Event) -> None:
        transfer = self._transfers[event.transfer]
        transfer.error = transfer.error or event.error
        if event.kind == "packed":
            transfer.packing -= 1
        else:
            transfer.moving -= 1
        if event.error and transfer.moving and transfer.name not in self._abort:
            self._abort[transfer.name] = event.error  # a rank alone has nothing of it
        if not transfer.moving and not (transfer.source == "" and transfer.packing):
            del self._transfers[transfer.name]
        if transfer.source == "":
            self._released(transfer)
        elif not transfer.moving:
            self._received(transfer)

    def _released(self, transfer: _Transfer) -> None:
        """A computed sequence's blocks go back once nothing reads them."""
        sequence = transfer.sequence
        if sequence.id in self.batching.holding and not transfer.packing and self._of.get(sequence.id) is transfer:
            del self._of[sequence.id]
            self._end(sequence)

    def _received(self, transfer: _Transfer) -> None:
        sequence = transfer.sequence
        if transfer.error or transfer.given_up:
            if not transfer.given_up:
                self._news.failed[sequence.id] = transfer.error
            del self._of[sequence.id]
            self._end(sequence)
        else:
            transfer.done = True
            self._news.arrived.append(sequence.id)
            self._deliver(transfer)

    def _deliver(self, transfer: _Transfer) -> None:
        """Decode, once KV and first token are here."""
        if transfer.done and transfer.token is not None and not transfer.given_up:
            del self._of[transfer.sequence.id]
            self.batching.deliver(transfer.sequence, transfer.token)

    def _on_abort(self, command: Abort) -> None:
        sequence, transfer = self._sequences.get(command.id), self._of.get(command.id)
        if sequence is None:
            return  # it has ended meanwhile
        if transfer is None or transfer.name not in self._transfers:
            self._of.pop(command.id, None)
            self._end(sequence)
        elif not transfer.given_up:
            transfer.given_up = True
            self._abort[transfer.name] = command.reason
            self.batching.hold(sequence)
            if transfer.source == "":
                self._released(transfer)

    def _link(self, command: Link) -> None:
        """Body of a thread: a handshake takes its time, and decoding goes on."""
        try:
            self._ranks.link(Instance(command.name, command.addresses))
            self._inbox.put(Linked(command.name))
        except HetkvError as error:
            final = isinstance(error, (AuthenticationError, HandshakeError))
            self._inbox.put(Linked(command.name, f"{type(error).__name__}: {error}", final))

    def _report(self) -> None:
        news, self._news = self._news, _News()
        came, gone = self._blocks.news()
        if news.reset:
            came, gone = self._blocks.hashes, []
        report = Report(
            load=self.load(), outputs=news.outputs, failed=news.failed, arrived=news.arrived, linked=news.linked,
            progress=news.progress, came=came, gone=gone, reset=news.reset, error=news.error,
        )  # fmt: skip
        self._on_report(report)

    def load(self) -> Load:
        """How the engine is doing; for its own thread."""
        at = self.batching
        prompts = (at.waiting, at.resumed, at.prefilling.values())
        return Load(
            waiting=len(at.waiting) + len(at.resumed),
            running=len(at.prefilling) + len(at.decoding),
            incoming=len(at.expected) + len(at.receiving) + len(at.ready),
            holding=len(at.holding),
            prompt_tokens=sum(s.target - s.computed for queue in prompts for s in queue),
            free_blocks=self._blocks.available,
            preemptions=at.preemptions,
            steps=self._steps,
            computed_tokens=self._computed,
            busy_s=self._busy_s,
            prompt_token_s=self._prompt_token_s,
        )
