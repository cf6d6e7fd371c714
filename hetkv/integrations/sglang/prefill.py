"""A prefill rank: links to decode ranks, and what it sends of each request: `PrefillSide`."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import AbortNotification
from sglang.srt.utils.network import NetworkAddress

from hetkv.errors import HetkvError, WaitTimeoutError
from hetkv.integrations.sglang.messages import ASK, LINKED, REGISTER, Ask, Linked, Register, encode
from hetkv.integrations.sglang.pool import read_aux
from hetkv.kv.pool import KVPool
from hetkv.transport.sender import Sender, SendHandle

_log = logging.getLogger(__name__)
ABORT = b"ABORT"
DRAIN_S = 60.0
HOLD_S = 1e6
"""A request has no limit of its own: SGLang's timeouts end it."""


@dataclass
class _Outgoing:
    tx: SendHandle
    ask: Ask
    blocks: list[int] = field(default_factory=list)


class PrefillSide:
    """`send` and `forget` are called in the scheduler's thread; one thread of its own hears the decode ranks."""

    def __init__(self, manager: Any, pool: KVPool, instance: str, options: dict[str, Any]) -> None:
        self._manager, self._page = manager, manager.kv_args.page_size
        self.node = Sender(pool, instance=instance, **options)
        self._out: dict[int, _Outgoing] = {}
        self._linked: set[str] = set()
        threading.Thread(target=self._hear, name="hetkv-sglang-prefill", daemon=True).start()

    def send(self, room: int, pages: Any, place: slice, last: bool, aux_index: int | None = None,
             wait_event: Any = None, indices_event: Any = None, **_: Any) -> None:  # fmt: skip
        """Pages `place` of the request are computed; with the `last` ones goes the metadata."""
        for event in (wait_event, indices_event):
            if event is not None:
                event.synchronize()
        try:
            out = self._out.get(room) or self._open(room)
            if place.stop > out.ask.pages:
                raise HetkvError(f"{place.stop} pages are sent, {out.ask.pages} were asked for")
            more = [int(page) for page in pages]
            if more:
                out.tx.extend(more)
                self.node.batch([(out.tx, (place.start * self._page, place.stop * self._page))]).send_layers()
            if last:
                out.tx.carry(read_aux(self._manager.kv_args, aux_index or 0))
        except HetkvError as error:
            self._manager.conclude_failure(bootstrap_room=room, failure_reason=str(error))
            return
        self._manager.update_status(room, KVPoll.Transferring)

    def forget(self, room: int) -> None:
        """The request has ended: returns once nothing reads its pages."""
        out = self._out.pop(room, None)
        if out is None:
            return
        out.tx.abort("SGLang ended the request")
        try:
            out.tx.wait(DRAIN_S)
        except WaitTimeoutError:
            raise
        except HetkvError:
            return

    def close(self) -> None:
        """End all links."""
        self.node.close()

    def _open(self, room: int) -> _Outgoing:
        asks = [ask for ask in self._manager.transfer_infos.get(room, {}).values() if not ask.is_dummy]
        if not asks:
            raise HetkvError(f"no decode rank asked for room {room}")
        tx = self.node.send(name_of(room), [], asks[0].pages * self._page, hold_s=HOLD_S)
        out = self._out[room] = _Outgoing(tx, asks[0])
        tx.future.add_done_callback(lambda _: self._ended(room, tx))
        return out

    def _ended(self, room: int, tx: SendHandle) -> None:
        """Callback of a request's future."""
        error = tx.future.exception()
        if error is None:
            self._manager.conclude_transfer(bootstrap_room=room, status=KVPoll.Success)
        else:
            self._manager.conclude_failure(bootstrap_room=room, failure_reason=f"{type(error).__name__}: {error}")

    def _hear(self) -> None:
        """Body of the thread."""
        while True:
            frames = self._manager.server_socket.recv_multipart()
            try:
                self._take(frames)
            except (msgspec.MsgspecError, HetkvError, IndexError) as error:
                _log.warning("a message of %d frames is dropped: %s", len(frames), error)

    def _take(self, frames: list[bytes]) -> None:
        if frames[0] == REGISTER:
            register = msgspec.msgpack.decode(frames[1], type=Register)
            threading.Thread(target=self._link, args=(register,), daemon=True).start()
        elif frames[0] == ASK:
            ask = msgspec.msgpack.decode(frames[1], type=Ask)
            asks = self._manager.transfer_infos.setdefault(ask.room, {})
            asks[ask.address] = ask
            if len(asks) >= ask.required:
                self._manager.req_to_decode_prefix_len[ask.room] = ask.prefix
                self._manager.update_status(ask.room, KVPoll.WaitingForInput)
        elif frames[0] == ABORT:
            abort = AbortNotification.from_zmq(frames)
            if abort is not None and abort.room in self._manager.request_status:
                self._manager.record_failure(abort.room, "the decode server has given the request up")
                self._manager.update_status(abort.room, KVPoll.Failed)
        else:
            _log.warning("a message of another kind is dropped: %r", frames[0][:32])

    def _link(self, register: Register) -> None:
        """Connect a decode rank, and tell it. One that registers again is the same one, or has another address."""
        error = ""
        try:
            if register.address not in self._linked:
                self.node.connect(register.address)
                self._linked.add(register.address)
        except HetkvError as failed:
            error = f"{type(failed).__name__}: {failed}"
            _log.error("decode rank at %s: %s", register.address, error)
        manager = self._manager
        linked = Linked(manager.local_ip, manager.rank_port, self.node.instance, error)
        at = NetworkAddress(register.endpoint, register.dst_port)
        with suppress(Exception):
            manager._send_multipart_locked(at.to_tcp(), encode(LINKED, linked), is_ipv6=at.is_ipv6)


def name_of(room: int) -> str:
    """A request on the wire."""
    return f"sglang/{room}"
