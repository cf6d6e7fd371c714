"""The process of one instance: its engine, and the connection to its scheduler, which it opens again when that is lost.

An instance that loses its scheduler gives up what it computes, as nobody would take it, and registers again where a
scheduler answers. Its weights and its prefix cache stay.
"""

from __future__ import annotations

import logging
import secrets
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from hetkv.control.address import Address
from hetkv.control.channel import Channel
from hetkv.control.reactor import Steps
from hetkv.control.reactor import run as run_steps
from hetkv.control.secret import SecretFile
from hetkv.control.tls import Tls, TlsConfig
from hetkv.errors import (
    AuthenticationError,
    CertificateError,
    ControlTimeoutError,
    HandshakeError,
    HetkvError,
    PeerLostError,
    SecretError,
)
from hetkv.integrations.fingerprint import checkpoint_fingerprint
from hetkv.models import ModelConfig
from hetkv.runtime.batching import Limits
from hetkv.runtime.block_manager import BlockManager
from hetkv.runtime.checkpoint import read_checkpoint
from hetkv.runtime.commands import Report, Reset
from hetkv.runtime.engine import Engine
from hetkv.runtime.plan import InstancePlan
from hetkv.runtime.rank import RankConfig
from hetkv.runtime.rank_processes import ranks_of
from hetkv.runtime.step_log import StepLog
from hetkv.runtime.synthetic import shape
from hetkv.serve.messages import Beat, Goodbye, Hello, Leaving, Rejected, ToScheduler, Trace, Welcome
from hetkv.serve.wire import GREETING_BYTES, LENGTH, NEEDS_TLS, NONCE_BYTES, PROOF_BYTES, Seal, greeting

BEAT_S = 1.0
CONNECT_S = 5.0
RETRY_S = (0.1, 2.0)
"""Wait between attempts to reach a scheduler: the first one, and the longest."""
log = logging.getLogger("hetkv.serve.instance")


class InstanceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance is started with."""

    plan: InstancePlan
    """Its role is the one it begins with."""
    model: str
    """Checkpoint directory; or `shape:NAME` for random weights of a named shape, which only times mean something of."""
    scheduler: str
    """`host:port`."""
    pool: str = ""
    gpu: str = ""
    limits: Limits = Limits()
    kv_tokens: int | None = None
    memory_share: float = 0.9
    unit: int = 0
    compute_dtype: str = "float32"
    threads: int = 1
    host: str = "127.0.0.1"
    """Where other instances reach it."""
    weight: float = 1.0
    trace: bool = False
    """Tell the scheduler when which layer moved."""
    secret_file: str | None = None
    steps: str | None = None
    """Folder that gets a file with a row for each step, see `StepLog`."""
    tls: TlsConfig | None = None


class Connection:
    """A channel to the scheduler that both have proved themselves on. Any thread may send and wake; one receives."""

    def __init__(self, address: str, secret: bytes, tls: Tls | None = None) -> None:
        """Raises `PeerLostError`, and `AuthenticationError` with its subclasses."""
        host, port = Address.parse(address)
        self._peer = f"scheduler {address}"
        try:
            self._channel = Channel(socket.create_connection((host, port), CONNECT_S), self._peer)
        except OSError as error:
            raise PeerLostError(f"{self._peer}: {error.strerror or error}") from None
        self._lock = threading.Lock()
        try:
            self._seal = run_steps(self._begin(host, secret, tls, time.monotonic() + CONNECT_S))
        except ControlTimeoutError as error:
            self._channel.close()
            raise PeerLostError(str(error)) from None
        except BaseException:
            self._channel.close()
            raise

    def _begin(self, host: str, secret: bytes, tls: Tls | None, deadline: float) -> Steps[Seal]:
        certificates = b""
        if tls is not None:
            own = tls.credentials()
            yield from self._channel.start_tls(own.client, host, deadline)
            fingerprint, names = self._channel.certificate()
            rejection = tls.check(self._peer, names)
            if rejection is not None:
                raise rejection
            certificates = own.fingerprint + fingerprint
        mine = greeting(secrets.token_bytes(NONCE_BYTES))
        yield from self._channel.write(mine, deadline)
        # The scheduler's greeting, or the alert of one that needs TLS.
        theirs = yield from self._channel.read(len(NEEDS_TLS), deadline, "greeting")
        if tls is None and theirs == NEEDS_TLS:
            text = f"{self._peer}: TLS: the peer asks for it, and this side has none"
            raise CertificateError(text, "missing", own=True)
        theirs += yield from self._channel.read(GREETING_BYTES - len(theirs), deadline, "greeting")
        seal = Seal("instance", secret, mine, theirs, certificates)
        yield from self._channel.write(seal.proof, deadline)
        seal.check((yield from self._channel.read(PROOF_BYTES, deadline, "proof")))
        return seal

    def send(self, message: ToScheduler) -> None:
        """Raises `PeerLostError`."""
        with self._lock:
            run_steps(self._channel.write(self._seal.close(message), None))

    def receive(self) -> Any:
        """The next message. Raises `PeerLostError` at the end."""
        head = run_steps(self._channel.read(LENGTH.size, None, "message"))
        return self._seal.open(run_steps(self._channel.read(self._seal.rest(head), None, "message")))

    def wake(self) -> None:
        """End it, for threads that send or receive."""
        self._channel.wake()

    def close(self) -> None:
        """End it, and give its descriptor back. No other thread may be receiving."""
        self.wake()
        with self._lock:
            self._channel.close()


class Instance:
    """An engine that registers with a scheduler. `run` returns when the scheduler ends it."""

    def __init__(self, config: InstanceConfig) -> None:
        self.config = config
        self._secrets = SecretFile(config.secret_file)
        self._tls = Tls(config.tls) if config.tls is not None else None
        self.name = f"{config.plan.name}.{secrets.token_hex(2)}"
        """Different from that of one that had this place before, which others may still have a link to."""
        described = model_config(config.model)
        model: str | ModelConfig
        if is_shape(config.model):
            model, fingerprint = described, {"weights": config.model}
        else:
            model, fingerprint = config.model, checkpoint_fingerprint(Path(config.model))
        rank = RankConfig(
            plan=msgspec.structs.replace(config.plan, name=self.name), model=model, secret=self._secrets,
            tls=config.tls, compute_dtype=config.compute_dtype, kv_tokens=config.kv_tokens,
            memory_share=config.memory_share, step_tokens=config.limits.max_num_batched_tokens,
            threads=config.threads, host=config.host, fingerprint=fingerprint, trace=config.trace,
        )  # fmt: skip
        self._ranks = ranks_of(rank)
        facts = self._ranks.facts
        block_size = config.plan.pool.block_size
        blocks = BlockManager(min(fact.blocks for fact in facts), block_size, config.unit)
        self.hello = Hello(
            name=self.name, role=config.plan.role, pool=config.pool or config.plan.role,  # type: ignore[arg-type]
            gpu=config.gpu or facts[0].device, device=facts[0].device, model=config.model, fingerprint=fingerprint,
            addresses=tuple(fact.address for fact in facts), blocks=blocks.total, block_size=block_size,
            token_bytes=sum(fact.token_bytes for fact in facts), unit=config.unit,
            max_num_seqs=config.limits.max_num_seqs, max_context=described.max_context,
            vocabulary=described.vocab_size, weight=config.weight, kv=str(config.plan.pool), tp=config.plan.tp,
            pp=config.plan.pp,
        )  # fmt: skip
        log = None if config.steps is None else StepLog(Path(config.steps) / f"{self.name}.csv")
        self._engine = Engine(self._ranks, blocks, config.limits, self._report, log)
        self._connection: Connection | None = None
        self._ending = threading.Event()
        self._failed = ""

    def run(self) -> int:
        """Serve until `leave`, an order to end, or a failure; the process's exit status."""
        self._engine.start()
        threading.Thread(target=self._beat, name="hetkv-beat", daemon=True).start()
        wait = RETRY_S[0]
        try:
            while not self._ending.is_set():
                try:
                    self._serve()
                    wait = RETRY_S[0]
                except PeerLostError as error:
                    log.info("%s: %s; trying again", self.name, error)
                except (AuthenticationError, HandshakeError) as error:
                    self._end(str(error))
                self._engine.submit(Reset())  # nobody would take what is computed now
                self._ending.wait(wait)
                wait = min(2 * wait, RETRY_S[1])
        finally:
            self._engine.close()
        if self._failed:
            log.error("%s: %s", self.name, self._failed)
        return int(bool(self._failed))

    def leave(self) -> None:
        """Take no new requests, finish those that are here, then end."""
        if self._connection is None:
            self._end("")
        else:
            self._send(Leaving())

    def _serve(self) -> None:
        """One connection, from hello to its end."""
        connection = self._connect()
        try:
            connection.send(self.hello)
            self._connection = connection
            while True:
                message = connection.receive()
                if isinstance(message, Rejected):
                    self._end(f"rejected: {message.reason}")
                    return
                if isinstance(message, Goodbye):
                    self._end("")
                    return
                if isinstance(message, Welcome):
                    log.info("%s: registered at %s", self.name, self.config.scheduler)
                else:
                    self._engine.submit(message)
        except PeerLostError:
            if not self._ending.is_set():
                raise
        finally:
            self._connection = None
            connection.close()

    def _connect(self) -> Connection:
        """With the secret, and where the scheduler does not have it yet, with the one before it."""
        accepted = self._secrets.accepted()
        for number, secret in enumerate(accepted):
            try:
                return Connection(self.config.scheduler, secret, self._tls)
            except SecretError:
                if number == len(accepted) - 1:
                    raise
        raise AssertionError("there is always a secret")

    def _report(self, report: Report) -> None:
        """Called in the engine's thread."""
        self._send(report)
        if report.error:
            self._end(report.error)

    def _beat(self) -> None:
        """Body of a thread: say that the process lives, and what the transport did."""
        while not self._ending.wait(BEAT_S / 2 if self.config.trace else BEAT_S):
            if self.config.trace:
                with suppress(HetkvError):
                    self._send(Trace(self._ranks.trace(), time.time_ns() - time.monotonic_ns()))
            self._send(Beat())

    def _send(self, message: ToScheduler) -> None:
        connection = self._connection
        if connection is not None:
            with suppress(PeerLostError):  # the receiving thread finds out, too
                connection.send(message)

    def _end(self, failure: str) -> None:
        self._failed = self._failed or failure
        self._ending.set()
        connection = self._connection
        if connection is not None:
            connection.wake()


def is_shape(model: str) -> bool:
    """Whether a model is a shape with random weights."""
    return model.startswith("shape:")


def model_config(model: str) -> ModelConfig:
    """Of a checkpoint directory, or of `shape:NAME`."""
    return shape(model.removeprefix("shape:")) if is_shape(model) else read_checkpoint(model)


def run(config: InstanceConfig) -> int:
    """Body of an instance's process; SIGTERM and Ctrl-C make it leave in order, a second time at once."""
    try:
        instance = Instance(config)
    except HetkvError as error:
        log.error("%s: %s", config.plan.name, error)
        return 2

    def leave(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        threading.Thread(target=instance.leave, daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    return instance.run()
