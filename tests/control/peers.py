"""What the control channel's tests share: descriptions, pairs of connections, a proxy that sees and changes bytes."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

from hetkv.control.connection import ControlConnection
from hetkv.control.description import Description, group_layers, host_id
from hetkv.control.establish import connect
from hetkv.control.listener import Listener
from hetkv.errors import ControlError
from hetkv.kv.dtypes import DType
from hetkv.kv.layout import KVLayout
from hetkv.kv.scale import ScaleLayout
from hetkv.kv.spec import KVSpec, Shard

SECRET = b"a secret of at least sixteen bytes"
HELLO_BYTES, PROOF_BYTES = 88, 36
SPEC = KVSpec.uniform(4, 4, 64)


def describe(
    role: str, spec: KVSpec = SPEC, dtype: DType = DType.BFLOAT16, scale: ScaleLayout | None = None, **changes: object
) -> Description:
    """A description whose layouts fit its spec and shard; `changes` replace fields."""
    shard = changes.get("shard", Shard.whole(spec))
    layers = {}
    for index in range(*shard.layers):
        layer = spec.layers[index]
        if layer.shares is not None:
            continue
        name = "nhd" if layer.kind == "kv" else layer.kind
        kind = DType.UINT8 if layer.kind == "state" else dtype
        layout = KVLayout.preset(name, layer, shard.heads[index].size, 16, kind, scale)
        layers[index] = SimpleNamespace(layout=layout, num_blocks=100)
    values = {
        "role": role,
        "instance": f"{role}-0",
        "pid": 1,
        "host": host_id(),
        "spec": spec,
        "shard": shard,
        "layers": group_layers(layers),
        "worker_address": b"\x01\x02",
        "slot_bytes": 1 << 20 if role == "receiver" else 0,
        "heartbeat_interval_ms": 500,
        "heartbeat_timeout_ms": 3000,
        "lease_ms": 30000,
    }
    return Description(**(values | changes))


class Rejected(NamedTuple):
    peer: str
    error: Exception


class Server:
    """A listener that collects what it is handed."""

    def __init__(self, address: str = "127.0.0.1:0", role: str = "receiver", **options: object) -> None:
        self.connections: queue.Queue[ControlConnection] = queue.Queue()
        self.rejected: queue.Queue[Rejected] = queue.Queue()
        defaults = {
            "secret": SECRET,
            "describe": lambda: describe(role),
            "on_connection": self.connections.put,
            "on_rejected": lambda peer, error: self.rejected.put(Rejected(peer, error)),
            "timeout": 5.0,
        }
        self.listener = Listener(address, role=role, **(defaults | options))
        self.address = self.listener.address

    def next(self) -> ControlConnection:
        return self.connections.get(timeout=10)

    def error(self) -> Exception:
        return self.rejected.get(timeout=10).error


@contextlib.contextmanager
def serving(address: str = "127.0.0.1:0", role: str = "receiver", **options: object) -> Iterator[Server]:
    server = Server(address, role, **options)
    try:
        yield server
    finally:
        server.listener.close()
        while not server.connections.empty():
            server.connections.get().close()


def join(server: Server, role: str = "sender", address: str | None = None, **options: object) -> ControlConnection:
    defaults = {"secret": SECRET, "describe": lambda: describe(role), "timeout": 5.0}
    return connect(address or server.address, role=role, **(defaults | options))


@contextlib.contextmanager
def linked(**options: object) -> Iterator[tuple[ControlConnection, ControlConnection]]:
    """(connecting side, listening side)."""
    with serving(**options) as server, join(server) as client, server.next() as peer:
        yield client, peer


class Proxy:
    """Forwards one connection to `target`; records both directions and passes them through `change`."""

    def __init__(self, target: str) -> None:
        self.sent = {"up": bytearray(), "down": bytearray()}
        self.change: Callable[[str, bytes], bytes] = lambda direction, data: data
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self.up: socket.socket | None = None
        self._threads = [threading.Thread(target=self._run)]
        self._threads[0].start()

    def _run(self) -> None:
        self.down, _ = self._server.accept()
        self.up = socket.create_connection(self._target)
        self._threads.append(threading.Thread(target=self._pump, args=("up", self.down, self.up)))
        self._threads[1].start()
        self._pump("down", self.up, self.down)

    def _pump(self, direction: str, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                data = self.change(direction, data)
                self.sent[direction] += data
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        for sock in (self.up, self.down):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in (self.up, self.down):
            if sock is not None:
                sock.close()


@contextlib.contextmanager
def raw_server(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """A TCP server for one client, whose socket goes to `behave`; yields its address."""
    server = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        sock, _ = server.accept()
        with sock, contextlib.suppress(OSError):
            behave(sock)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    finally:
        thread.join()
        server.close()


def raw_client(address: str) -> socket.socket:
    host, port = address.rsplit(":", 1)
    sock = socket.create_connection((host.strip("[]"), int(port)), 10)
    sock.settimeout(10)
    return sock


def drain(sock: socket.socket) -> bytes:
    """Everything until the other side ends."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := sock.recv(65536):
            data += part
    return data


def loss_of(connection: ControlConnection, seconds: float = 5.0) -> ControlError:
    """Wait for the loss, check that it is reported exactly once, return it."""
    reported: list[ControlError] = []
    event = threading.Event()
    connection.on_lost(lambda error: (reported.append(error), event.set()))
    assert event.wait(seconds)
    time.sleep(0.02)
    assert len(reported) == 1
    assert connection.lost is reported[0]
    return reported[0]
