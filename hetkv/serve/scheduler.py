"""The global scheduler: which instance computes a prompt and which one decodes it, and what happens when one is lost.

It pairs by the simulator's `Router`. A request that finds no instance waits here. When an instance is lost its requests
begin again elsewhere with the tokens that they have; clients see a pause. Everything runs in one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import get_args

from hetkv.errors import InputError
from hetkv.runtime.block_manager import prefix_hashes
from hetkv.runtime.commands import Abort, Begin, Compute, Expect, Link, Linked, Output, Report, Reset
from hetkv.serve.generation import Generation
from hetkv.serve.member import Member
from hetkv.serve.messages import Goodbye, Hello, Rejected, Role, Welcome
from hetkv.simulator.router import BALANCED, Router

MOST_ATTEMPTS = 5
"""Of one request, before it fails: an instance that is lost takes all its requests with it, a fault a few."""
LINK_ATTEMPTS = 3
log = logging.getLogger("hetkv.serve.scheduler")


class Scheduler:
    """The fleet. `on_end` is called with each generation that has ended, however it did."""

    def __init__(
        self, prefill: str = BALANCED, decode: str = BALANCED, on_end: Callable[[Generation], None] | None = None
    ) -> None:
        self.members: dict[str, Member] = {}
        self.entry: Router[Member] = Router([], prefill)
        self.decode: Router[Member] = Router([], decode, for_decode=True)
        self.waiting: deque[Generation] = deque()
        """No instance can take them now."""
        self.generations: dict[str, Generation] = {}
        self.rejected: dict[str, str] = {}
        """Instances that did not fit, and why."""
        self._on_end = on_end or (lambda generation: None)
        self._link_attempts: dict[tuple[str, str], int] = {}
        self._empty = asyncio.Event()

    # -- requests

    def submit(self, generation: Generation) -> None:
        """Begin with a request; its tokens come out of it. Raises `InputError` for one that no instance can hold."""
        longest = self.longest
        need = len(generation.prompt) + generation.sampling.max_tokens - 1  # the last token needs no KV
        if longest is not None and need > longest:
            raise InputError(f"{need} tokens are more than an instance holds: {longest}")
        unit = max((member.kv.hash_tokens for member in self.members.values()), default=0)
        if unit:
            generation.hashes = prefix_hashes(generation.prompt, unit)
        self.generations[generation.id] = generation
        self._empty.clear()
        self._dispatch(generation)

    def cancel(self, generation: Generation) -> None:
        """The client has left."""
        if not generation.ended:
            self._withdraw(generation, "the client has left")
            self._end(generation, "abort")

    @property
    def longest(self) -> int | None:
        """Tokens that every instance holds for one request; None while there is none."""
        return min(
            (min(m.hello.max_context, m.kv.total * m.kv.block_size) for m in self.members.values()), default=None
        )

    async def drained(self) -> None:
        """Wait until no request is left."""
        if self.generations:
            await self._empty.wait()

    def _dispatch(self, generation: Generation) -> None:
        home = self.entry.choose(generation)
        if home is not None and self.entry.central and not home.free_for_more():
            home = next((member for member in self.entry.by_load() if member.free_for_more()), None)
        peer = None
        if home is not None and home.role != "aggregated" and self._remaining(generation) > 1:
            peer = self.decode.choose(generation)
            if peer is None:  # what it computed could go nowhere
                home = next((member for member in self.entry.by_load() if member.role == "aggregated"), None)
        if home is None:
            if generation not in self.waiting:
                self.waiting.append(generation)
            return
        generation.attempt += 1
        generation.begun = False
        tokens, done = generation.prompt + generation.generated, len(generation.generated)
        generation.home, generation.left = home, generation.target
        home.generations[generation.transfer] = generation
        home.count(1, generation.left)
        if peer is None:
            home.send(Compute(generation.transfer, tokens, generation.sampling, done))
            return
        generation.peer, generation.coming = peer, generation.target
        peer.generations[generation.transfer] = generation
        peer.count(1, 0, generation.coming)
        transfer = generation.transfer
        peer.send(Expect(transfer, tokens, generation.sampling, home.name, transfer, done))
        home.send(Compute(transfer, tokens, generation.sampling, done, peer.name, transfer))

    def _remaining(self, generation: Generation) -> int:
        return generation.sampling.max_tokens - len(generation.generated)

    def _dispatch_waiting(self) -> None:
        """Something has changed: those that wait may be taken now."""
        for _ in range(len(self.waiting)):
            generation = self.waiting.popleft()
            self._dispatch(generation)
            if self.waiting and self.waiting[-1] is generation:  # in line again: so are those after it
                self.waiting.rotate(1)
                return

    def _end(self, generation: Generation, finish: str) -> None:
        generation.finish, generation.ended = finish, True
        del self.generations[generation.id]
        if generation in self.waiting:
            self.waiting.remove(generation)
        if not self.generations:
            self._empty.set()
        self._on_end(generation)

    def _leave_home(self, generation: Generation) -> None:
        home, generation.home = generation.home, None
        if home is not None:
            home.count(-1, -generation.left)
            generation.left = 0
            if generation.peer is not home:
                del home.generations[generation.transfer]
            self._say_goodbye(home)

    def _leave_peer(self, generation: Generation) -> None:
        peer, generation.peer = generation.peer, None
        if peer is not None:
            peer.count(-1, 0, -generation.coming)
            generation.coming = 0
            del peer.generations[generation.transfer]
            self._say_goodbye(peer)

    def _withdraw(self, generation: Generation, reason: str) -> None:
        """Take it from its instances."""
        for member in {generation.home, generation.peer} - {None}:
            assert member is not None
            if member.name in self.members:
                member.send(Abort(generation.transfer, reason))
        self._leave_home(generation)
        self._leave_peer(generation)

    def _again(self, generation: Generation, reason: str) -> None:
        """It lost what was computed of it: begin with the tokens that are there."""
        self._withdraw(generation, reason)
        generation.restarts += 1
        if generation.attempt >= MOST_ATTEMPTS:
            self._end(generation, "error")
            generation.fail(f"given up after {generation.attempt} attempts; the last one: {reason}")
        else:
            self._dispatch(generation)

    # -- reports

    def on_report(self, member: Member, report: Report) -> None:
        """What an instance says of its work."""
        member.take(report)
        for name, stop in report.progress.items():
            self._on_progress(member, name, stop)
        for name in report.arrived:
            self._on_arrived(member, name)
        for output in report.outputs:
            self._on_output(member, output)
        for name, reason in report.failed.items():
            generation = member.generations.get(name)
            if generation is not None:
                log.warning("%s lost a request: %s", member.name, reason)
                self._again(generation, f"{member.name}: {reason}")
        for linked in report.linked:
            self._on_linked(member, linked)
        if self.waiting:
            self._dispatch_waiting()

    def _on_progress(self, member: Member, name: str, stop: int) -> None:
        generation = member.generations.get(name)
        if generation is not None and generation.home is member:
            generation.scheduled = generation.scheduled or time.monotonic()
            left = max(0, generation.target - stop)
            member.count(0, left - generation.left)
            generation.left = left

    def _on_arrived(self, member: Member, name: str) -> None:
        generation = member.generations.get(name)
        if generation is not None and generation.peer is member and generation.coming:
            generation.visible = time.monotonic()
            member.count(0, 0, -generation.coming)
            generation.coming = 0
            if generation.begun:
                self._leave_home(generation)

    def _on_output(self, member: Member, output: Output) -> None:
        generation = member.generations.get(output.id)
        if generation is None:
            return  # given up meanwhile
        if generation.home is member:
            member.count(0, -generation.left)
            generation.left = 0
            generation.prefilled = generation.prefilled or time.monotonic()
        generation.push(output.token, output.finish)
        if output.finish:
            if generation.peer is not None and generation.peer is not member:
                self._withdraw(generation, "the answer is complete")
            self._leave_home(generation)
            self._leave_peer(generation)
            self._end(generation, output.finish)
        elif generation.peer is not None and not generation.begun:
            generation.begun = True
            generation.peer.send(Begin(generation.transfer, output.token.id))
            if not generation.coming:
                self._leave_home(generation)

    # -- instances

    def join(self, member: Member) -> None:
        """A new instance; it gets requests once it is linked. One that does not fit is rejected."""
        reason = self._against(member.hello)
        if reason:
            self.reject(member, reason)
            return
        equal = (other.pool for other in self.members.values() if other.pool.kind == member.pool.kind)
        member.pool = next(equal, member.pool)
        self.members[member.name] = member
        hello = member.hello
        log.info("%s joined: %s on %s, KV %s, %d tokens", member.name, member.role, hello.gpu, hello.kv,
                 hello.blocks * hello.block_size)  # fmt: skip
        member.send(Welcome())
        member.send(Reset())
        self._link()

    def leave(self, member: Member) -> None:
        """An instance takes no new requests. It hears `Goodbye` once those that are there have ended."""
        member.leaving = True
        self._route(member, False)
        self._say_goodbye(member)

    def lost(self, member: Member, reason: str) -> None:
        """An instance is gone with all it had."""
        if self.members.pop(member.name, None) is None:
            return
        log.log(logging.INFO if member.leaving else logging.WARNING, "%s is gone: %s", member.name, reason)
        self._route(member, False)
        member.pool.forget(member.name)
        for generation in list(member.generations.values()):
            self._again(generation, f"{member.name} is gone")
        for other in self.members.values():
            other.links.pop(member.name, None)
        self._link()

    def set_role(self, name: str, role: str) -> Member:
        """Let an instance prefill, decode, or both, once it is linked for that. Its weights and its cache stay, and
        what it has begun it ends as it began it. Raises `InputError`."""
        member = self.members.get(name)
        if member is None:
            raise InputError(f"no instance {name!r}; there are {', '.join(self.members) or 'none'}")
        if role not in get_args(Role):
            raise InputError(f"role {role!r}: {', '.join(get_args(Role))}")
        member.wanted = role  # type: ignore[assignment]
        self._link()
        return member

    def reject(self, member: Member, reason: str) -> None:
        """It does not fit, and has to end."""
        self.rejected[member.name] = reason
        log.warning("%s is rejected: %s", member.name, reason)
        member.send(Rejected(reason))
        self.lost(member, "it was rejected")

    def _against(self, hello: Hello) -> str:
        """Why an instance cannot serve with those that are there."""
        for other in self.members.values():
            for name, mine in hello.fingerprint.items():
                theirs = other.hello.fingerprint.get(name, mine)
                if mine != theirs:
                    return f"its {name} {mine} are not those of {other.name}, {theirs}"
            if hello.unit and other.hello.unit and hello.unit != other.hello.unit:
                return f"it caches prefixes of {hello.unit} tokens, {other.name} of {other.hello.unit}"
        return ""

    def _pairs(self) -> Iterator[tuple[Member, Member]]:
        """(prefill, decode) that must be linked."""
        for source in self.members.values():
            for sink in self.members.values():
                if source.wanted == "prefill" and sink.wanted == "decode":
                    yield source, sink

    def _link(self) -> None:
        """Begin with the links that are missing, and route to those instances that have all of theirs."""
        missing = set()
        for source, sink in self._pairs():
            if source.name not in sink.links:
                sink.links[source.name] = False
                sink.send(Link(source.name, source.hello.addresses))
            if not sink.links[source.name]:
                # A newcomer that cannot be linked must not stop what works.
                missing |= {member for member in (source, sink) if not member.up or member.role != member.wanted}
        for member in self.members.values():
            if not member.leaving and member not in missing and (not member.up or member.role != member.wanted):
                self._route(member, False)
                member.role = member.wanted
                self._route(member, True)
                log.info("%s is %s from now on", member.name, member.role)
        if self.waiting:
            self._dispatch_waiting()

    def _on_linked(self, sink: Member, linked: Linked) -> None:
        source = self.members.get(linked.name)
        if source is None or linked.name not in sink.links:
            return
        pair = (linked.name, sink.name)
        self._link_attempts[pair] = self._link_attempts.get(pair, 0) + 1
        if not linked.error:
            sink.links[linked.name] = True
        elif self._link_attempts[pair] < LINK_ATTEMPTS and not linked.final:
            sink.send(Link(source.name, source.hello.addresses))
            return
        del self._link_attempts[pair]
        if linked.error:
            del sink.links[linked.name]
            newer = max(source, sink, key=lambda member: (not member.up, member.role != member.wanted, member.joined))
            reason = f"{sink.name} cannot take KV of {source.name}: {linked.error}"
            if newer.up:
                log.warning("%s stays %s: %s", newer.name, newer.role, reason)
                newer.wanted = newer.role
            else:
                self.reject(newer, reason)
        self._link()

    def _route(self, member: Member, up: bool) -> None:
        router = self.decode if member.role == "decode" else self.entry
        member.set_up(up)
        if member in router.instances:
            router.remove(member)
        if up:
            router.add(member)

    def _say_goodbye(self, member: Member) -> None:
        if member.leaving and not member.generations and member.name in self.members:
            member.send(Goodbye())
