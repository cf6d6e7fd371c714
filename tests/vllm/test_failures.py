"""Processes that are killed and started again, sides that do not fit, secrets that differ; and 500 requests."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hetkv.control.tls import TlsConfig
from tests.control.authority import Authority
from tests.vllm.engines import Engine, Pair, checkpoint, until

TOKENS = 8
PRODUCE = {"do_remote_decode": True, "do_remote_prefill": False}
LEASE_S = 8.0
OPTIONS: dict[str, Any] = {
    "extra": {"transfer": {"lease_s": LEASE_S, "hold_s": LEASE_S}},
    "enable_prefix_caching": True,
}


def prompt_of(length: int, seed: int) -> list[int]:
    """A random prompt."""
    draw = random.Random(seed)
    return [draw.randrange(5, 1000) for _ in range(length)]


def consumer_of(model: str, policy: str = "recompute") -> Engine:
    return Engine(model, "kv_consumer", 128, policy=policy, **dict(OPTIONS))


def producer_of(model: str) -> Engine:
    return Engine(model, "kv_producer", 32, max_num_batched_tokens=256, **dict(OPTIONS))


@pytest.fixture(scope="module")
def model(models: Path) -> str:
    return checkpoint(models)


def test_consumer_killed_and_started_again(model: str) -> None:
    """The producer gets its blocks back, and serves the next consumer."""
    pair = Pair(producer_of(model), consumer_of(model))
    prompt = prompt_of(1400, 1)
    alone = pair.consumer.run(prompt, TOKENS)
    known = pair.describe()
    pair.producer.call("pause", True)
    prefill, decode = pair.begin_concurrent(prompt, TOKENS, known)
    for _ in range(3):
        pair.producer.call("step_once")  # chunks leave for the consumer
    assert pair.consumer.call("take", decode) is None
    pair.consumer.kill()
    pair.producer.call("pause", False)
    assert pair.producer.wait(prefill).finish_reason == "length"
    until(lambda: pair.producer.call("free_blocks") == pair.free[0], LEASE_S - 2)  # not held for a lease
    until(lambda: not pair.producer.call("has_work"), LEASE_S + 5)

    again = Pair(pair.producer, consumer_of(model))
    for mode in ("prefill_first", "concurrent"):
        output = getattr(again, mode)(prompt, TOKENS)
        assert (output.tokens, output.computed) == (alone.tokens, TOKENS)
        again.consumer.call("reset_prefix_cache")
    again.settled()
    again.close()


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_producer_killed_and_started_again(model: str, policy: str) -> None:
    """A request in flight is computed by the consumer or failed, as vLLM's policy says; the next one is served."""
    pair = Pair(producer_of(model), consumer_of(model, policy))
    prompt = prompt_of(1400, 2)
    alone = pair.consumer.run(prompt, TOKENS)
    pair.consumer.call("reset_prefix_cache")
    known = pair.describe()
    pair.producer.call("pause", True)
    _, decode = pair.begin_concurrent(prompt, TOKENS, known)
    for _ in range(3):
        pair.producer.call("step_once")
    pair.producer.kill()
    output = pair.consumer.wait(decode)
    check_policy(policy, output, prompt, alone.tokens)

    start = time.monotonic()  # an address where nobody listens any more
    output = pair.consumer.run(prompt_of(300, 3), TOKENS, {**known, "transfer_id": "gone"})
    assert output.finish_reason == ("length" if policy == "recompute" else "error")
    assert time.monotonic() - start < LEASE_S

    again = Pair(producer_of(model), pair.consumer)
    for mode in ("prefill_first", "concurrent"):
        again.consumer.call("reset_prefix_cache")
        output = getattr(again, mode)(prompt, TOKENS)
        assert (output.tokens, output.computed) == (alone.tokens, TOKENS)
    again.settled()
    again.close()


def check_policy(policy: str, output: Any, prompt: list[int], expected: list[int]) -> None:
    """What becomes of a request whose KV did not arrive."""
    if policy == "fail":
        assert output.finish_reason == "error"
    else:
        assert (output.tokens, output.computed) == (expected, len(prompt) + TOKENS - 1)


@pytest.mark.slow  # what ends at once is tested without an engine: tests/transport/test_access.py
def test_a_certificate_that_is_rejected(model: str, tmp_path: Path) -> None:
    """A stranger's, an expired and a revoked one: the request is computed long before its lease ends, and the log says
    why. Files are read again, so that the right certificate in their place is enough."""
    ca = Authority(tmp_path / "ca")
    stranger = Authority(tmp_path / "stranger")
    revoked = ca.issue("decode", "127.0.0.1")
    ca.revoke(revoked)
    listening = ca.issue("prefill", "127.0.0.1", crl=ca.crl())
    lease = {"transfer": {"lease_s": 60, "hold_s": 60}}

    def extra(tls: TlsConfig) -> dict[str, Any]:
        return {**lease, "tls": {name: value for name, value in msgspec.to_builtins(tls).items() if value}}

    pair = Pair(
        Engine(model, "kv_producer", 32, **{**OPTIONS, "extra": extra(listening)}),
        Engine(model, "kv_consumer", 128, policy="recompute", **{**OPTIONS, "extra": extra(revoked)}),
    )
    known, seen = pair.describe(), 0

    def use(reason: str) -> None:
        made = {
            "revoked": lambda: revoked,
            "unknown-ca": lambda: stranger.issue("decode", "127.0.0.1"),
            "expired": lambda: ca.issue("decode", "127.0.0.1", begins=-3, ends=-2),
        }[reason]()
        for name in ("certificate", "key"):
            Path(getattr(revoked, name)).write_bytes(Path(getattr(made, name)).read_bytes())

    for number, (reason, text) in enumerate(
        [("revoked", "was revoked"), ("unknown-ca", "does not trust"), ("expired", "has expired")]
    ):
        use(reason)
        prompt = prompt_of(200, 50 + number)
        start = time.monotonic()
        output = pair.consumer.run(prompt, TOKENS, {**known, "transfer_id": reason})
        assert time.monotonic() - start < 30
        assert output.computed == len(prompt) + TOKENS - 1
        warned = pair.consumer.call("warned")[seen:]
        seen += len(warned)
        assert any("CertificateError" in line and text in line for line in warned)
    renewed = ca.issue("decode", "127.0.0.1")
    assert renewed.certificate == revoked.certificate
    prompt = prompt_of(200, 60)
    assert pair.prefill_first(prompt, TOKENS).computed == TOKENS
    pair.settled()
    pair.close()


def test_inside_a_multi_connector(model: str) -> None:
    """Not shown to work, so the start says no, by name."""
    ours = {
        "kv_connector": "HetKVConnector",
        "kv_connector_module_path": "hetkv.integrations.vllm",
        "kv_role": "kv_producer",
    }
    extra = {"connectors": [ours]}
    engine = Engine(model, "kv_producer", 32, connector="MultiConnector", module=None, extra=extra)
    assert engine.error is not None
    assert "HetKVConnector inside MultiConnector" in engine.error
    engine.kill()


DRAFT = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}


def test_what_is_not_served(model: str) -> None:
    """Where no command line says it the engine's start does, by name."""
    engine = Engine(model, "kv_producer", 32, speculative_config=DRAFT)
    assert engine.error is not None
    assert "speculative decoding has not been shown" in engine.error
    engine.kill()


@pytest.mark.parametrize("who", ["producer", "consumer"])
def test_caches_that_go_and_come_back(model: str, who: str) -> None:
    """What vLLM 0.33 calls around sleep: nothing is linked meanwhile, and transfers go on afterwards."""
    pair = Pair(producer_of(model), consumer_of(model, "fail"))
    side = pair.producer if who == "producer" else pair.consumer
    first, second = prompt_of(300, 6), prompt_of(300, 7)
    alone = [pair.consumer.run(prompt, TOKENS).tokens for prompt in (first, second)]
    assert pair.consumer.call("reset_prefix_cache")
    assert pair.prefill_first(first, TOKENS).tokens == alone[0]
    pair.settled()
    for _ in range(2):
        side.call("connector", "unregister_kv_caches")
    other = pair.consumer if who == "producer" else pair.producer
    until(lambda: other.call("links") == 0)
    for _ in range(2):
        side.call("connector", "restore_kv_caches")
    assert pair.prefill_first(second, TOKENS).tokens == alone[1]
    pair.settled()
    pair.close()


def test_a_failed_load_keeps_what_was_held(model: str) -> None:
    """With one cache group failures are reported by block, so the consumer's own prefix stays."""
    short = {**OPTIONS, "extra": {"transfer": {"lease_s": 2.0}}}
    pair = Pair(producer_of(model), Engine(model, "kv_consumer", 128, policy="recompute", **short))
    start, tail = prompt_of(512, 4), prompt_of(300, 5)
    pair.consumer.run(start, 1)
    known = pair.describe()
    output = pair.consumer.run(start + tail, TOKENS, {**known, "transfer_id": "nobody sends this"})
    assert output.computed == len(tail) + TOKENS - 1
    pair.settled()
    pair.close()


def test_incompatible_models_are_rejected(models: Path, model: str) -> None:
    """The handshake names what differs, and the request is computed by the consumer."""
    other = checkpoint(models, kv_heads=7, head_dim=96)
    pair = Pair(producer_of(other), consumer_of(model))
    output = pair.prefill_first(prompt_of(200, 6), TOKENS)
    assert output.computed == 200 + TOKENS - 1
    assert pair.consumer.call("stats")["payload_bytes"] == 0
    pair.close()


@pytest.mark.slow
def test_other_secret_is_rejected(tmp_path: Path, model: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("another secret of thirty-two bytes")
    secret.chmod(0o600)
    extra = {**OPTIONS["extra"], "secret_file": str(secret)}
    pair = Pair(producer_of(model), Engine(model, "kv_consumer", 128, policy="recompute", extra=extra))
    output = pair.prefill_first(prompt_of(200, 7), TOKENS)
    assert output.computed == 200 + TOKENS - 1
    pair.close()


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"secret_file": "/nonexistent/secret"}, "/nonexistent/secret"),
        pytest.param({"transfer": {"lease_s": -1}}, "lease_s", marks=pytest.mark.slow),
    ],
)
def test_wrong_settings_end_the_start(model: str, extra: dict[str, Any], said: str) -> None:
    engine = Engine(model, "kv_consumer", 128, extra=extra)
    assert engine.error is not None
    assert "InputError" in engine.error
    assert said in engine.error, json.dumps(extra)
    engine.close()


@pytest.mark.parametrize("requests", [160, pytest.param(500, marks=pytest.mark.slow)])
def test_many_requests_leave_nothing(model: str, requests: int) -> None:
    """Both modes, aborts among them, several at once: no block, request, ticket, slot, thread or descriptor stays."""
    pair = Pair(producer_of(model), consumer_of(model))
    known, draw = pair.describe(), random.Random(8)
    sizes: list[dict[str, list[int]]] = []
    for count in range(0, requests, 4):
        names = []
        for i in range(count, count + 4):
            prompt = prompt_of(draw.randrange(1, 260), 1000 + i)
            if i % 2:
                names.append(pair.begin_concurrent(prompt, 2, known)[1])
            else:
                first = pair.producer.run(prompt, 1, PRODUCE)
                names.append(pair.consumer.add(prompt, 2, first.params))
        if count % 20 == 0:
            pair.consumer.call("abort", names.pop(draw.randrange(4)))
        for name in names:
            assert pair.consumer.wait(name).finish_reason == "length"
        if count in (60, requests - 4):
            pair.settled()
            sizes.append({side: getattr(pair, side).call("resources") for side in ("producer", "consumer")})
    assert sizes[0] == sizes[1]
    assert pair.producer.call("stats")["quarantined_slots"] == 0
    pair.close()
