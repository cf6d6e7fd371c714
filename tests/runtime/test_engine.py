"""Engines: tokens are those of `transformers` at concurrency 32, in one instance and across two; nothing stays."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from hetkv.runtime.batching import Limits
from hetkv.runtime.commands import Abort, Begin, Compute, Expect
from hetkv.runtime.sampling import Sampling
from tests.control.authority import Authority
from tests.runtime.instances import Instance, instances, reference, save_tiny, wait_until

COUNT, NEW = 32, 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    path = tmp_path_factory.mktemp("tiny")
    return path, save_tiny(path)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(5)
    head = [rng.randrange(199) for _ in range(40)]
    return [head[: rng.choice((0, 20, 40))] + [rng.randrange(199) for _ in range(rng.randrange(1, 90))]
            for _ in range(COUNT)]  # fmt: skip


@pytest.fixture(scope="module")
def expected(tiny: tuple[Path, LlamaForCausalLM], prompts: list[list[int]]) -> list[list[int]]:
    return [reference(tiny[1], prompt, NEW) for prompt in prompts]


@pytest.fixture(scope="module")
def pair(tiny: tuple[Path, LlamaForCausalLM]) -> Iterator[tuple[Instance, Instance]]:
    """A prefill and a decode instance of other block sizes and layouts."""
    with instances(
        Instance("prefill-0", tiny[0], limits=Limits(64, 64)), Instance("decode-0", tiny[0], block=8, layout="rocm")
    ) as (prefill, decode):
        decode.link(prefill)
        prefill.on_first = lambda id, token: decode.engine.submit(Begin(id, token))
        yield prefill, decode


def send(prefill: Instance, decode: Instance, id: str, prompt: list[int], sampling: Sampling) -> None:
    decode.engine.submit(Expect(id, prompt, sampling, source=prefill.name, transfer=id))
    prefill.engine.submit(Compute(id, prompt, sampling, goes_to=decode.name, transfer=id))


@pytest.mark.parametrize("kv_tokens", [4096, 320])
def test_one_instance(
    tiny: tuple[Path, LlamaForCausalLM], prompts: list[list[int]], expected: list[list[int]], kv_tokens: int
) -> None:
    """Also where the pool holds few of the sequences at a time, so that they preempt each other."""
    with instances(Instance("all", tiny[0], kv_tokens=kv_tokens, limits=Limits(64, 100))) as (one,):
        for number, prompt in enumerate(prompts):
            one.engine.submit(Compute(str(number), prompt, Sampling(max_tokens=NEW)))
        wait_until([one], lambda: len(one.finished) == COUNT)
        assert [one.tokens[str(number)] for number in range(COUNT)] == expected
        assert set(one.finished.values()) == {"length"}
        wait_until([one], one.is_empty)
        assert (one.engine.batching.preemptions > 0) == (kv_tokens < 4096)


def test_prefill_here_decode_there(
    pair: tuple[Instance, Instance], prompts: list[list[int]], expected: list[list[int]]
) -> None:
    prefill, decode = pair
    for number, prompt in enumerate(prompts):
        send(prefill, decode, str(number), prompt, Sampling(max_tokens=NEW))
    wait_until([prefill, decode], lambda: len(decode.finished) == COUNT)
    got = [prefill.tokens[str(n)] + decode.tokens[str(n)] for n in range(COUNT)]
    assert got == expected
    wait_until([prefill, decode], lambda: prefill.is_empty() and decode.is_empty())


def test_the_whole_prefix_that_both_have_is_neither_computed_nor_sent(
    pair: tuple[Instance, Instance], tiny: tuple[Path, LlamaForCausalLM]
) -> None:
    prefill, decode = pair
    prompt = [(7 * i) % 199 for i in range(100)]
    counts = []
    for name in ("first", "again"):
        before = prefill.engine.load().computed_tokens, decode.ranks.rank.exchange.receiver.stats()["payload_bytes"]
        send(prefill, decode, name, prompt, Sampling(max_tokens=NEW))
        wait_until([prefill, decode], lambda name=name: name in decode.finished)
        after = prefill.engine.load().computed_tokens, decode.ranks.rank.exchange.receiver.stats()["payload_bytes"]
        counts.append((after[0] - before[0], after[1] - before[1]))
        assert prefill.tokens[name] + decode.tokens[name] == reference(tiny[1], prompt, NEW)
    assert counts[0][0] == 100
    assert counts[1][0] == 100 - 96
    assert counts[1][1] == counts[0][1] * 4 // 100


def test_seeds_and_ends(pair: tuple[Instance, Instance], prompts: list[list[int]]) -> None:
    """A seed gives the same answer in one instance and across two; one token needs no decoding."""
    prefill, decode = pair
    warm = Sampling(max_tokens=NEW, temperature=1.0, top_k=50, top_p=0.9, seed=11)
    send(prefill, decode, "across", prompts[0], warm)
    decode.engine.submit(Compute("here", prompts[0], warm))
    decode.engine.submit(Compute("other", prompts[0], Sampling(max_tokens=NEW, temperature=1.0, seed=12)))
    prefill.engine.submit(Compute("one", prompts[0], Sampling(max_tokens=1)))
    wait_until([prefill, decode], lambda: {"across", "here", "other"} <= set(decode.finished))
    assert prefill.tokens["across"] + decode.tokens["across"] == decode.tokens["here"] != decode.tokens["other"]
    wait_until([prefill], lambda: "one" in prefill.finished)
    assert len(prefill.tokens["one"]) == 1
    wait_until([prefill, decode], lambda: prefill.is_empty() and decode.is_empty())


def test_a_sequence_goes_on_elsewhere(
    pair: tuple[Instance, Instance], prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """What another instance generated before it was lost is computed with the prompt, and not generated again."""
    prefill, decode = pair
    sampling, done = Sampling(max_tokens=NEW), 5
    tokens = prompts[1] + expected[1][:done]
    decode.engine.submit(Expect("moved", tokens, sampling, "prefill-0", "moved", generated=done))
    prefill.engine.submit(Compute("moved", tokens, sampling, done, decode.name, "moved"))
    wait_until([prefill, decode], lambda: "moved" in decode.finished)
    assert prefill.tokens["moved"] + decode.tokens["moved"] == expected[1][done:]


def test_random_aborts_leave_nothing(pair: tuple[Instance, Instance], prompts: list[list[int]]) -> None:
    prefill, decode = pair
    rng = random.Random(3)
    kept = set()
    for turn in range(4):
        for number, prompt in enumerate(prompts):
            name = f"abort-{turn}-{number}"
            send(prefill, decode, name, prompt, Sampling(max_tokens=NEW))
            if rng.random() < 0.6:
                prefill.engine.submit(Abort(name))
                decode.engine.submit(Abort(name))
            else:
                kept.add(name)
            if rng.random() < 0.2:
                gone = rng.choice(sorted(kept)) if kept else name
                kept.discard(gone)
                for side in (prefill, decode):
                    side.engine.submit(Abort(gone))
        wait_until([prefill, decode], lambda: kept <= set(decode.finished))
    wait_until([prefill, decode], lambda: prefill.is_empty() and decode.is_empty())
    stats = decode.ranks.rank.exchange.receiver.stats()
    assert stats["open_requests"] == stats["granted_slots"] == 0


def test_what_cannot_be_is_reported(pair: tuple[Instance, Instance]) -> None:
    """A prompt that the pool cannot hold, and one whose source is not linked, are lost at once, not waited for."""
    _, decode = pair
    decode.engine.submit(Compute("long", [1] * 4090, Sampling(max_tokens=20)))
    decode.engine.submit(Expect("stranger", [1] * 10, Sampling(max_tokens=20), "prefill-9", "stranger"))
    wait_until([decode], lambda: {"long", "stranger"} <= set(decode.failed))
    assert "blocks are needed" in decode.failed["long"]
    assert "prefill-9" in decode.failed["stranger"]
    wait_until([decode], decode.is_empty)


def test_instances_of_several_ranks(
    tiny: tuple[Path, LlamaForCausalLM], prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """TP 2 prefills, PP 2 decodes: each rank sends to and receives from those that share something with it."""
    with instances(
        Instance("wide", tiny[0], tp=2, limits=Limits(64, 64)), Instance("deep", tiny[0], pp=2, block=8)
    ) as (wide, deep):
        deep.link(wide)
        wide.on_first = lambda id, token: deep.engine.submit(Begin(id, token))
        for number in range(8):
            send(wide, deep, str(number), prompts[number], Sampling(max_tokens=NEW))
            if number % 4 == 3:
                for side in (wide, deep):
                    side.engine.submit(Abort(str(number)))
        kept = [number for number in range(8) if number % 4 < 3]
        wait_until([wide, deep], lambda: {str(number) for number in kept} <= set(deep.finished))
        assert [wide.tokens[str(n)] + deep.tokens[str(n)] for n in kept] == [expected[n] for n in kept]
        wait_until([wide, deep], lambda: wide.is_empty() and deep.is_empty())


@pytest.mark.parametrize("tp", [1, 2])
def test_a_certificate_that_is_rejected_is_final(tiny: tuple[Path, LlamaForCausalLM], tmp_path: Path, tp: int) -> None:
    """The scheduler hears why, and that there is no use in another attempt; also of ranks in other processes."""
    ca = Authority(tmp_path / "ca")
    revoked = ca.issue("revoked", "127.0.0.1")
    ca.revoke(revoked)
    listening = ca.issue("prefill", "127.0.0.1", crl=ca.crl())
    wrong = {
        "does not trust the": Authority(tmp_path / "stranger").issue("stranger", "127.0.0.1", ca=ca.file),
        "has expired": ca.issue("expired", "127.0.0.1", begins=-3, ends=-2),
        "was revoked": revoked,
    }
    with instances(Instance("prefill-0", tiny[0], tls=listening)) as (prefill,):
        for text, side in list(wrong.items())[: 3 if tp == 1 else 1]:  # processes take seconds to start
            with instances(Instance("decode-0", tiny[0], tp=tp, tls=side)) as (decode,):
                linked = decode.linked_to(prefill)
                assert linked.error.startswith("CertificateError: ")
                assert text in linked.error
                assert linked.final
