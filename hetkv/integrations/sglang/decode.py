"""A decode rank: where prefill ranks connect, and what it expects of each request: `DecodeSide`."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import msgspec
from sglang.srt.disaggregation.base.conn import KVPoll

from hetkv.errors import HetkvError, PeerLostError, WaitTimeoutError
from hetkv.integrations.sglang.messages import ASK, LINKED, REGISTER, Ask, Linked, Register, encode
from hetkv.integrations.sglang.pool import write_aux
from hetkv.integrations.sglang.prefill import DRAIN_S, name_of
from hetkv.kv.pool import KVPool
from hetkv.transport.receiver import Receiver, RecvHandle

_log = logging.getLogger(__name__)
LOOK_S = 0.002
"""Between two looks at the requests that are under way."""
LINK_S = 10.0
"""Until a link is ready here that its prefill rank says it has."""


@dataclass
class _Incoming:
    blocks: list[int]
    aux_index: int
    ranks: list[tuple[str, int]]
    """Prefill ranks that send it: SGLang's address of each."""
    deadline: float
    linked: float | None = None
    """When all of them had said that they are linked."""
    rx: RecvHandle | None = None


class DecodeSide:
    """`expect` and `forget` are called in the scheduler's thread; two threads hear prefill ranks and await requests."""

    def __init__(self, manager: Any, pool: KVPool, instance: str, options: dict[str, Any]) -> None:
        self._manager, self._page = manager, manager.kv_args.page_size
        self.node = Receiver(pool, instance=instance, **options)
        host = f"[{manager.local_ip}]" if ":" in manager.local_ip else manager.local_ip
        self.address = self.node.listen(f"{host}:0")
        self._links: dict[tuple[str, int], Linked] = {}
        self._in: dict[int, _Incoming] = {}
        self._lock = threading.Condition()
        for body in (self._hear, self._await):
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
        until = time.monotonic() + self._manager.waiting_timeout
        with self._lock:
            self._in[room] = _Incoming([int(page) for page in pages], aux_index or 0, ranks, until)
            self._lock.notify_all()

    def forget(self, room: int) -> None:
        """The request has ended: returns once nothing writes to its pages."""
        with self._lock:
            incoming = self._in.pop(room, None)
        if incoming is None or incoming.rx is None:
            return
        incoming.rx.abort("SGLang ended the request")
        try:
            incoming.rx.wait(DRAIN_S)
        except WaitTimeoutError:
            raise
        except HetkvError:
            return

    def close(self) -> None:
        """End all links."""
        self.node.close()

    def _await(self) -> None:
        """Body of a thread."""
        while True:
            with self._lock:
                while not self._in:
                    self._lock.wait()
                for room, incoming in list(self._in.items()):
                    try:
                        done = self._advance(room, incoming)
                    except HetkvError as error:
                        self._manager.record_failure(room, f"{type(error).__name__}: {error}")
                        self._manager.update_status(room, KVPoll.Failed)
                        done = True
                    if done:
                        del self._in[room]
            time.sleep(LOOK_S)

    def _advance(self, room: int, incoming: _Incoming) -> bool:
        """Whether the request is here. Raises its error."""
        if time.monotonic() > incoming.deadline:
            raise WaitTimeoutError(f"nothing has come within {self._manager.waiting_timeout:g} s")
        if incoming.rx is None:
            links = [self._links.get(rank) for rank in incoming.ranks]
            for link in links:
                if link is not None and link.error:
                    raise PeerLostError(f"{link.rank_ip}:{link.rank_port} has not connected: {link.error}")
            if None in links or not links or links[0] is None:
                return False
            now = time.monotonic()
            incoming.linked = incoming.linked or now
            try:
                incoming.rx = self.node.receive(
                    name_of(room), incoming.blocks, len(incoming.blocks) * self._page, src_instance=links[0].instance,
                    lease_s=max(0.001, incoming.deadline - now), payload=True,
                )  # fmt: skip
            except PeerLostError:
                if now > incoming.linked + LINK_S:
                    raise
                return False
        if not incoming.rx.done():
            return False
        incoming.rx.wait(0.001)
        try:
            data = incoming.rx.payload(0)
        except WaitTimeoutError:
            return False
        write_aux(self._manager.kv_args, incoming.aux_index, data)
        self._manager.update_status(room, KVPoll.Success)
        return True

    def _hear(self) -> None:
        """Body of a thread. That a prefill rank has sent all is no news: this side knows by itself."""
        while True:
            frames = self._manager.server_socket.recv_multipart()
            try:
                if frames[0] == LINKED:
                    linked = msgspec.msgpack.decode(frames[1], type=Linked)
                    self._links[linked.rank_ip, linked.rank_port] = linked
                    continue
            except (msgspec.MsgspecError, IndexError) as error:
                _log.warning("a message of %d frames is dropped: %s", len(frames), error)
                continue
            status = self._manager.parse_kv_status_message(frames)
            if status is not None and status[1] == KVPoll.Failed:
                room, code, rank, reason = status
                self._manager.apply_prefill_status(
                    bootstrap_room=room, status=code, prefill_rank=rank, failure_reason=reason
                )
