"""A decode rank: where prefill ranks connect, and what it expects of each request: `DecodeSide`."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from hetkv.errors import HetkvError, InputError, PeerLostError, WaitTimeoutError
from hetkv.integrations.sglang.ending import LOOK_S, Ending, wait_for
from hetkv.integrations.sglang.manager import Manager, hear_all
from hetkv.integrations.sglang.messages import ASK, LINKED, REGISTER, Ask, Linked, Register, encode, name_of
from hetkv.integrations.sglang.pool import write_aux
from hetkv.integrations.sglang.workers import Workers
from hetkv.kv.pool import KVPool
from hetkv.transport.receiver import Receiver, RecvHandle

_log = logging.getLogger(__name__)
LINK_S = 10.0
"""Until a link is ready here that its prefill rank says it has, or until a lost one is made again."""
ASK_S = 1.0
"""Between two registrations with one prefill rank."""

Rank = tuple[str, int]
"""A prefill rank: SGLang's address of it."""


@dataclass
class _Incoming:
    blocks: list[int]
    aux_index: int | None
    ranks: list[Rank]
    """That send it."""
    began: float
    deadline: float
    lost: float | None = None
    """Since when a link that was there is missing."""
    rx: RecvHandle | None = None
    reason: str | None = None
    """Why it has failed."""
    ending: Ending | None = None

    def end(self, reason: str) -> None:
        """Give it up; the first reason stays."""
        if self.reason is None:
            self.reason = reason
            if self.rx is not None:
                self.rx.abort(reason)
                self.ending = Ending(self.rx)

    def over(self) -> bool:
        """Whether it has failed and nothing writes to its pages any more."""
        return self.reason is not None and (self.ending is None or self.ending.over())


class DecodeSide:
    """`expect`, `drained` and `forget` are called in the scheduler's thread; two threads hear prefill ranks and await
    requests. A request stays known until its transfer has ended, and is reported as failed only then."""

    def __init__(self, manager: Manager, pool: KVPool, instance: str, options: dict[str, Any]) -> None:
        self._manager, self._page = manager, manager.kv_args.page_size
        self.node = Receiver(pool, instance=instance, **options)
        host = f"[{manager.local_ip}]" if ":" in manager.local_ip else manager.local_ip
        self.address = self.node.listen(f"{host}:0")
        self._links: dict[Rank, tuple[Linked, float]] = {}
        """What each rank has said last, and when."""
        self._asked: dict[Rank, float] = {}
        self._in: dict[int, _Incoming] = {}
        self._lock = threading.Condition()
        self._workers = Workers("hetkv-sglang-register")
        for body in (partial(hear_all, manager, self._take), self._await):
            threading.Thread(target=body, name="hetkv-sglang-decode", daemon=True).start()

    def registration(self) -> list[bytes]:
        """See `Register`."""
        return encode(REGISTER, Register(self.address, self._manager.local_ip, self._manager.rank_port))

    def request(self, *, bootstrap_room: int, required_dst_info_num: int, kv_indices: Any, is_dummy: bool,
                decode_prefix_len: int | None = None, **_: Any) -> list[bytes]:  # fmt: skip
        """See `Ask`."""
        return encode(ASK, Ask(
            bootstrap_room, self.address, self._manager.local_ip, self._manager.rank_port, len(kv_indices),
            required_dst_info_num, decode_prefix_len or 0, is_dummy,
        ))  # fmt: skip

    def expect(self, room: int, pages: Any, aux_index: int | None, infos: list[dict[str, Any]]) -> None:
        """A request's pages are allocated: ask for its KV once its prefill ranks are linked."""
        ranks = [(str(info["rank_ip"]), int(info["rank_port"])) for info in infos if not info["is_dummy"]]
        now = time.monotonic()
        until = now + self._manager.waiting_timeout
        with self._lock:
            self._in[room] = _Incoming([int(page) for page in pages], aux_index, ranks, now, until)
            self._lock.notify_all()

    def drained(self, room: int) -> bool:
        """SGLang has ended the request: give it up. Whether nothing writes to its pages any more; never waits."""
        with self._lock:
            incoming = self._in.get(room)
            if incoming is None:
                return True
            incoming.end("SGLang ended the request")
            if incoming.over():
                del self._in[room]
                return True
            return False

    def forget(self, room: int) -> None:
        """SGLang has ended the request: returns once nothing writes to its pages, and not before."""
        wait_for(self.drained, room)

    def close(self) -> None:
        """End all links."""
        self._workers.close()
        self.node.close()

    def _await(self) -> None:
        """Body of a thread. An exception ends its request, not the thread."""
        while True:
            with self._lock:
                while not self._in:
                    self._lock.wait()
                for room, incoming in list(self._in.items()):
                    ended = incoming.over()
                    try:
                        over = self._look(room, incoming)
                    except Exception as error:
                        if not isinstance(error, HetkvError):
                            _log.exception("request %d", room)
                        incoming.end(f"{type(error).__name__}: {error}")
                        over = ended  # what SGLang was to hear has raised
                    if over:
                        del self._in[room]
            time.sleep(LOOK_S)

    def _look(self, room: int, incoming: _Incoming) -> bool:
        """Whether the request is over, and SGLang knows."""
        if incoming.reason is None:
            return self._advance(room, incoming)
        if incoming.over():
            self._manager.fail(room, incoming.reason)
            return True
        return False

    def _advance(self, room: int, incoming: _Incoming) -> bool:
        """Whether the request is here. Raises its error."""
        now = time.monotonic()
        if now > incoming.deadline:
            raise WaitTimeoutError(f"nothing has come within {self._manager.waiting_timeout:g} s")
        if incoming.aux_index is None:
            raise InputError("SGLang has given the request no row for its metadata")
        if incoming.rx is None:
            instance = self._source(incoming, now)
            if instance is None:
                return False
            try:
                incoming.rx = self.node.receive(
                    name_of(room), incoming.blocks, len(incoming.blocks) * self._page, src_instance=instance,
                    lease_s=max(0.001, incoming.deadline - now), payload=True,
                )  # fmt: skip
            except PeerLostError:
                incoming.lost = incoming.lost or now
                if now > incoming.lost + LINK_S:
                    raise
                self._register(incoming.ranks, now)
                return False
        if not incoming.rx.done():
            return False
        incoming.rx.wait(0.001)
        try:
            data = incoming.rx.payload(0)
        except WaitTimeoutError:
            return False
        write_aux(self._manager.kv_args, incoming.aux_index, data)
        self._manager.succeed(room)
        return True

    def _source(self, incoming: _Incoming, now: float) -> str | None:
        """The instance that sends a request, once all its ranks say that they have connected.

        Raises `PeerLostError` where one has tried in vain since the request began: the next request asks it again.
        """
        missing, instance = [], None
        for rank in incoming.ranks:
            linked, at = self._links.get(rank, (None, 0.0))
            if linked is not None and linked.error and at >= incoming.began:
                raise PeerLostError(f"{linked.rank_ip}:{linked.rank_port} has not connected: {linked.error}")
            if linked is None or linked.error:
                missing.append(rank)
            else:
                instance = linked.instance
        self._register(missing, now)
        return None if missing else instance

    def _register(self, ranks: list[Rank], now: float) -> None:
        """Ask prefill ranks to connect, again: SGLang itself registers once, before the first request of a rank."""
        for rank in ranks:
            if now >= self._asked.setdefault(rank, now) + ASK_S:
                self._asked[rank] = now
                self._workers.run(rank, partial(self._manager.write, *rank, self.registration()))

    def _take(self, frames: list[bytes]) -> None:
        if frames[0] == LINKED:
            linked = msgspec.msgpack.decode(frames[1], type=Linked)
            if linked.address == self.address:  # and not of one that was here before
                self._links[linked.rank_ip, linked.rank_port] = linked, time.monotonic()
        else:
            self._manager.take_status(frames)
