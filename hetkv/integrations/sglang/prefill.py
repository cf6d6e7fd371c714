"""A prefill rank: links to decode ranks, and what it sends of each request: `PrefillSide`."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from hetkv.errors import HetkvError, InputError
from hetkv.integrations.sglang.ending import Ending, wait_for
from hetkv.integrations.sglang.manager import Manager, hear_all
from hetkv.integrations.sglang.messages import ASK, LINKED, REGISTER, Ask, Linked, Register, encode, name_of
from hetkv.integrations.sglang.pool import read_aux
from hetkv.integrations.sglang.workers import Workers
from hetkv.kv.pool import KVPool
from hetkv.transport.peer import Peer
from hetkv.transport.sender import Sender, SendHandle

_log = logging.getLogger(__name__)
ABORT = b"ABORT"
HOLD_S = 1e6
"""A request has no limit of its own here: its decode rank's ends it, or SGLang gives it up."""


@dataclass
class _Outgoing:
    tx: SendHandle
    ask: Ask
    ending: Ending | None = None


class PrefillSide:
    """`send`, `drained` and `forget` are called in the scheduler's thread; one thread of its own hears the decode
    ranks, and a few connect to them."""

    def __init__(self, manager: Manager, pool: KVPool, instance: str, options: dict[str, Any]) -> None:
        self._manager, self._page = manager, manager.kv_args.page_size
        self.node = Sender(pool, instance=instance, **options)
        self._out: dict[int, _Outgoing] = {}
        self._linked: dict[str, Peer] = {}
        """By address; each was there once."""
        self._workers = Workers("hetkv-sglang-link")
        threading.Thread(target=hear_all, args=(manager, self._take), name="hetkv-sglang-prefill", daemon=True).start()

    def send(self, room: int, pages: Any, place: slice, last: bool, aux_index: int | None = None,
             wait_event: Any = None, indices_event: Any = None, **_: Any) -> None:  # fmt: skip
        """Pages `place` of the request are computed; with the `last` ones goes the metadata."""
        try:
            for event in (wait_event, indices_event):
                if event is not None:
                    event.synchronize()
            out = self._out.get(room) or self._open(room)
            if place.stop > out.ask.pages:
                raise HetkvError(f"{place.stop} pages are sent, {out.ask.pages} were asked for")
            more = [int(page) for page in pages]
            if more:
                out.tx.extend(more)
                self.node.batch([(out.tx, (place.start * self._page, place.stop * self._page))]).send_layers()
            if last:
                if aux_index is None:
                    raise InputError("SGLang has given the request no row for its metadata")
                out.tx.carry(read_aux(self._manager.kv_args, aux_index))
        except Exception as error:
            if not isinstance(error, HetkvError):
                _log.exception("request %d", room)
            self._manager.conclude(room, f"{type(error).__name__}: {error}")
            return
        self._manager.sending(room)

    def drained(self, room: int) -> bool:
        """SGLang has ended the request: give it up. Whether nothing reads its pages any more; never waits."""
        out = self._out.get(room)
        if out is None:
            return True
        if out.ending is None:
            out.tx.abort("SGLang ended the request")
            out.ending = Ending(out.tx)
        if out.ending.over():
            del self._out[room]
            return True
        return False

    def forget(self, room: int) -> None:
        """SGLang has ended the request: returns once nothing reads its pages, and not before."""
        wait_for(self.drained, room)

    def close(self) -> None:
        """End all links."""
        self._workers.close()
        self.node.close()

    def _open(self, room: int) -> _Outgoing:
        asks = [ask for ask in list(self._manager.transfer_infos.get(room, {}).values()) if not ask.is_dummy]
        if not asks:
            raise HetkvError(f"no decode rank asked for room {room}")
        tx = self.node.send(name_of(room), [], asks[0].pages * self._page, hold_s=HOLD_S)
        out = self._out[room] = _Outgoing(tx, asks[0])
        tx.future.add_done_callback(lambda _: self._ended(room, tx))
        return out

    def _ended(self, room: int, tx: SendHandle) -> None:
        """Callback of a request's future."""
        error = tx.future.exception()
        self._manager.conclude(room, None if error is None else f"{type(error).__name__}: {error}")

    def _take(self, frames: list[bytes]) -> None:
        if frames[0] == REGISTER:
            register = msgspec.msgpack.decode(frames[1], type=Register)
            self._workers.run(register.address, partial(self._link, register))
        elif frames[0] == ASK:
            ask = msgspec.msgpack.decode(frames[1], type=Ask)
            asks = self._manager.transfer_infos.setdefault(ask.room, {})
            asks[ask.address] = ask
            if len(asks) >= ask.required:
                self._manager.ready(ask.room, ask.prefix)
        elif frames[0] == ABORT:
            self._manager.take_abort(frames)
        else:
            _log.warning("a message of another kind is dropped: %r", frames[0][:32])

    def _link(self, register: Register) -> None:
        """Connect a decode rank unless it is linked, and tell it. It registers again where the link is lost."""
        error = ""
        try:
            if self._linked.get(register.address) not in self.node.peers:
                self._linked[register.address] = self.node.connect(register.address)
        except Exception as failed:
            error = f"{type(failed).__name__}: {failed}"
            expected = isinstance(failed, HetkvError)
            _log.error("decode rank at %s: %s", register.address, error, exc_info=not expected)
        manager = self._manager
        linked = Linked(register.address, manager.local_ip, manager.rank_port, self.node.instance, error)
        manager.write(register.endpoint, register.dst_port, encode(LINKED, linked))
