"""What SGLang's scheduler drives: a manager for each rank, a sender or receiver for each request, a bootstrap server.

SGLang's own part stays as it is: its bootstrap server tells a decode rank which prefill ranks it needs, and the decode
rank writes to these. `PrefillSide` and `DecodeSide` do the rest.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import (
    AbortNotification,
    CommonKVBootstrapServer,
    CommonKVManager,
    CommonKVReceiver,
    CommonKVSender,
)
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.runtime_context import get_device, get_disagg, get_parallel, get_serving
from sglang.srt.utils.network import NetworkAddress

from hetkv.integrations.sglang.decode import DecodeSide
from hetkv.integrations.sglang.model import add_heads, dtype_of, fingerprint_of
from hetkv.integrations.sglang.pool import check, pool_of
from hetkv.integrations.sglang.prefill import PrefillSide


class HetkvKVManager(CommonKVManager):
    """One rank's pool and its end of the transport."""

    kv_status_msg_tag = b"HETKV_STATUS"
    kv_status_msg_carries_reason = True

    def __init__(self, args: Any, disaggregation_mode: Any, server_args: Any, is_mla_backend: bool = False) -> None:
        """Raises `InputError` for what is not served, by name."""
        parallel = get_parallel()
        check(args, parallel, get_disagg().disaggregation_decode_allocation_policy, bool(is_mla_backend))
        add_heads(args, server_args, parallel.attn_tp_size)
        device = str(get_device().device)
        pool = pool_of(args, dtype_of(args, server_args), device, parallel.attn_tp_size, parallel.attn_tp_rank)
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        options = {
            "rank": self.attn_tp_rank,
            "tp": self.attn_tp_size,
            "fingerprint": fingerprint_of(server_args),
        }
        self.prefill: PrefillSide | None = None
        self.decode: DecodeSide | None = None
        host = self.dist_init_addr or self.local_ip
        if disaggregation_mode == DisaggregationMode.PREFILL:
            self.prefill = PrefillSide(self, pool, f"sglang-prefill-{host}-{self.bootstrap_port}", options)
        else:
            self.decode = DecodeSide(self, pool, f"sglang-decode-{host}-{get_serving().port}", options)
            self._start_heartbeat_checker_thread()

    def build_receiver_registration_message(self) -> list[bytes]:
        """To a prefill rank: where this decode rank listens."""
        assert self.decode is not None
        return self.decode.registration()

    def build_receiver_metadata_message(self, **request: Any) -> list[bytes]:
        """To a prefill rank: a request has its pages here."""
        assert self.decode is not None
        return self.decode.request(**request)

    def add_transfer_request(self, bootstrap_room: int, kv_indices: Any, index_slice: slice, is_last_chunk: bool,
                             **more: Any) -> None:  # fmt: skip
        """Send pages that are computed; called in the scheduler's thread."""
        assert self.prefill is not None
        if self.request_status.get(bootstrap_room) not in (None, KVPoll.Failed):
            self.prefill.send(bootstrap_room, kv_indices, index_slice, is_last_chunk, **more)

    # What follows is `manager.Manager`, which says what it is for.

    def hear(self) -> list[bytes]:
        return list(self.server_socket.recv_multipart())

    def write(self, ip: str, port: int, frames: list[bytes]) -> None:
        at = NetworkAddress(ip, port)
        self._send_multipart_locked(at.to_tcp(), frames, is_ipv6=at.is_ipv6)

    def fail(self, room: int, reason: str) -> None:
        if room in self.request_status:  # otherwise a later request of this room would take the reason for its own
            self.record_failure(room, reason)
            self.update_status(room, KVPoll.Failed)

    def succeed(self, room: int) -> None:
        self.update_status(room, KVPoll.Success)

    def ready(self, room: int, prefix: int) -> None:
        self.req_to_decode_prefix_len[room] = prefix
        self.update_status(room, KVPoll.WaitingForInput)

    def sending(self, room: int) -> None:
        self.update_status(room, KVPoll.Transferring)

    def conclude(self, room: int, failure: str | None) -> None:
        status = KVPoll.Success if failure is None else KVPoll.Failed
        self.conclude_transfer(bootstrap_room=room, status=status, failure_reason=failure)

    def take_abort(self, frames: list[bytes]) -> None:
        abort = AbortNotification.from_zmq(frames)
        if abort is not None:
            self.fail(abort.room, "the decode server has given the request up")

    def take_status(self, frames: list[bytes]) -> None:
        found = self.parse_kv_status_message(frames)
        if found is not None and found[1] == KVPoll.Failed:  # success is known here already
            room, status, rank, reason = found
            self.apply_prefill_status(bootstrap_room=room, status=status, prefill_rank=rank, failure_reason=reason)


class HetkvKVSender(CommonKVSender):
    """One request of a prefill rank. What ends it returns once nothing reads its pages, as SGLang frees them next."""

    def poll(self) -> Any:
        """A failure is reported once nothing reads the request's pages."""
        status = super().poll()
        held = status == KVPoll.Failed and not self.kv_mgr.prefill.drained(self.bootstrap_room)
        return KVPoll.Transferring if held else status

    def abort(self) -> None:
        """SGLang gives the request up."""
        super().abort()
        self.kv_mgr.prefill.forget(self.bootstrap_room)

    def clear(self) -> None:
        """The request has ended."""
        super().clear()
        self.kv_mgr.prefill.forget(self.bootstrap_room)


class HetkvKVReceiver(CommonKVReceiver):
    """One request of a decode rank. SGLang frees its pages after `clear`, which returns once nothing writes to them."""

    def poll(self) -> Any:
        """A failure is reported once nothing writes to the request's pages."""
        status = super().poll()
        held = status == KVPoll.Failed and not self.kv_mgr.decode.drained(self.bootstrap_room)
        return KVPoll.Transferring if held else status

    def failure_exception(self) -> None:
        """Also tells the prefill, which would keep the request where it failed before it was asked for."""
        self.ensure_abort_notified()
        super().failure_exception()

    def send_metadata(self, kv_indices: Any, aux_index: int | None = None, *args: Any, **more: Any) -> None:
        """Tell the prefill, and ask for the KV."""
        super().send_metadata(kv_indices, aux_index, *args, **more)
        if self.kv_mgr.request_status.get(self.bootstrap_room) not in (None, KVPoll.Failed):
            self.kv_mgr.decode.expect(self.bootstrap_room, kv_indices, aux_index, self.bootstrap_infos)

    def abort(self) -> None:
        """SGLang gives the request up; `poll` says `Failed` once nothing writes to its pages."""
        super().abort()
        self.kv_mgr.decode.drained(self.bootstrap_room)

    def clear(self) -> None:
        """The request has ended."""
        super().clear()
        self.kv_mgr.decode.forget(self.bootstrap_room)


class HetkvKVBootstrapServer(CommonKVBootstrapServer):
    """SGLang's own."""
