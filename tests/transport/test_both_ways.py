"""KV in both directions between two instances: many requests at once, and conversations of several turns."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2ForCausalLM, PreTrainedModel

from hetkv import Exchange
from hetkv.errors import PeerLostError, WaitTimeoutError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.runtime import Decoder
from hetkv.runtime.generation import generate
from hetkv.runtime.turns import Conversation, Station
from hetkv.transport.config import TransferConfig
from hetkv.transport.sender import SendHandle
from tests.runtime.test_mla import MODELS as LATENT_MODELS
from tests.runtime.test_runtime import DEMO, reference, save_random
from tests.transport.peers import SECRET, WAIT_S, deliver, duplicate, randomise, same_bytes, settled, until

SMALL = TransferConfig(slot_bytes=16384, window_bytes=4 * 16384)


@pytest.mark.parametrize("direct", [True, False])
def test_requests_in_both_directions_at_once(direct: bool) -> None:
    """Eight requests each way from two threads, of the same names, over pools of which each is read and written."""
    count, tokens = 8, 75
    config = TransferConfig(slot_bytes=16384, window_bytes=4 * 16384, direct=direct)
    spec = KVSpec.uniform(2, 3, 64)
    pools = [
        randomise(KVPool.allocate(spec, 80, layout="nhd", block_size=16), 1),
        randomise(KVPool.allocate(spec, 80, layout="rocm", block_size=24, dtype="fp16"), 2),
    ]
    # The first half of either pool's blocks is sent, the second half is written.
    sent = [[list(range(n * 5, n * 5 + 5)) for n in range(count)] for _ in pools]
    written = [[[40 + block for block in ids] for ids in lists] for lists in sent]
    expected = [duplicate(pool) for pool in pools]
    for number in range(count):
        deliver([(pools[0], [sent[0][number]])], expected[1], [written[1][number]], [(0, tokens)])
        deliver([(pools[1], [sent[1][number]])], expected[0], [written[0][number]], [(0, tokens)])
    with (
        Exchange(pools[0], secret=SECRET, instance="a", config=config) as a,
        Exchange(pools[1], secret=SECRET, instance="b", config=config) as b,
    ):
        b.connect(a.listen())
        until(lambda: len(a.sender.peers) == len(a.receiver.peers) == 1)
        failures: list[BaseException] = []

        def one_way(side: int) -> None:
            here, there = (a, b)[side], (b, a)[side]
            try:
                pending = []
                for number in range(count):
                    pending.append(there.receiver.receive(f"{number}", written[1 - side][number], tokens))
                    sending = here.sender.send(f"{number}", sent[side][number], tokens)
                    sending.send_layers()
                    pending.append(sending)
                for request in pending:
                    request.wait(WAIT_S)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=one_way, args=(side,)) for side in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        settled(a.sender, a.receiver, b.sender, b.receiver)
        assert same_bytes(pools[0], expected[0])
        assert same_bytes(pools[1], expected[1])


def test_the_end_of_one_direction_leaves_the_other() -> None:
    pools = [randomise(KVPool.allocate(KVSpec.uniform(1, 2, 32), 8), seed) for seed in range(2)]
    with (
        Exchange(pools[0], secret=SECRET, instance="a", config=SMALL) as a,
        Exchange(pools[1], secret=SECRET, instance="b", config=SMALL) as b,
    ):
        b.connect(a.listen())
        until(lambda: len(a.receiver.peers) == 1)
        lost = a.receiver.receive("never", [0], 16)
        b.sender.close()
        with pytest.raises(PeerLostError):
            lost.wait(WAIT_S)
        rx = b.receiver.receive("still", [3, 4], 32)
        sending = a.sender.send("still", [1, 2], 32)
        sending.send_layers()
        rx.wait(WAIT_S)
        sending.wait(WAIT_S)
        assert torch.equal(
            pools[1].view(0, "k")[[3, 4]].view(torch.int16), pools[0].view(0, "k")[[1, 2]].view(torch.int16)
        )


def test_a_failed_connect_links_neither_direction() -> None:
    pools = [KVPool.allocate(KVSpec.uniform(1, 2, 32), 8) for _ in range(2)]
    with (
        Exchange(pools[0], secret=SECRET, instance="a", config=SMALL) as a,
        Exchange(pools[1], secret=SECRET, instance="b", config=SMALL) as b,
    ):
        there = a.listen()
        with pytest.raises(PeerLostError):
            b.connect(there._replace(receiver="127.0.0.1:1"))
        until(lambda: not a.sender.peers and not b.receiver.peers)
        b.connect(there)
        until(lambda: len(a.sender.peers) == len(a.receiver.peers) == 1)


def load(name: str, directory: Path) -> tuple[Decoder, PreTrainedModel]:
    if name == "demo":
        return Decoder.load(DEMO), AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    if name in LATENT_MODELS:
        torch.manual_seed(7)
        truth = DeepseekV2ForCausalLM(LATENT_MODELS[name]).eval()
        with torch.no_grad():
            for parameter in truth.parameters():
                parameter.normal_(float(parameter.dim() == 1), 2.0 / parameter.shape[-1] ** 0.5)
        truth.save_pretrained(directory)
    else:
        truth = save_random(name, directory)
    return Decoder.load(directory), truth


@pytest.mark.parametrize(
    ("name", "sides", "chunk"),
    [
        ("demo", (("nhd", 16), ("rocm", 64)), None),
        ("mistral-sliding", (("hnd", 7), ("packed_nhd", 16)), 5),
        ("full", (("latent", 16), ("latent", 3)), None),
    ],
)
def test_conversation(
    name: str, sides: tuple[tuple[str, int], tuple[str, int]], chunk: int | None, tmp_path: Path
) -> None:
    """Three turns: each computes and sends only its new tokens, and says what `transformers` says from the start."""
    model, truth = load(name, tmp_path)
    generator = torch.Generator().manual_seed(11)
    pools = [KVPool.allocate(model.kv_spec, 300 // size, layout=layout, block_size=size, dtype="float32")
             for layout, size in sides]  # fmt: skip
    stations = [Station(model, pool, secret=SECRET, instance=name, config=SMALL)
                for name, pool in zip("pd", pools, strict=True)]  # fmt: skip
    with stations[0].exchange, stations[1].exchange:
        conversation = Conversation(*stations)
        said: list[int] = []
        for number, (asked, answered) in enumerate([(41, 37), (13, 50), (1, 20), (8, 1), (5, 4)]):
            prompt = torch.randint(3, 200, (asked,), generator=generator).tolist()
            turn = conversation.turn(prompt, answered, chunk=chunk)
            assert turn.tokens == reference(truth, said + prompt, answered)[: len(turn.tokens)]
            assert len(turn.tokens) == answered or turn.tokens[-1] in model.config.eos_ids
            # The answer's last token has no KV yet: it is computed with the next prompt.
            assert turn.computed == turn.sent == asked + (number > 0)
            assert turn.returned == len(turn.tokens) - 1
            said += prompt + turn.tokens
            token_bytes = sum(
                4 * segment.heads * segment.channels for layer in model.kv_spec.layers for segment in layer.segments
            )
            window = model.kv_spec.layers[0].sliding_window or 10**9
            assert turn.sent_bytes == min(turn.sent, window - 1) * token_bytes
            assert turn.returned_bytes == min(turn.returned, window - 1) * token_bytes
        assert conversation.tokens == said


@pytest.mark.parametrize("way", ["forward", "back"])
def test_a_turn_that_times_out_leaves_nothing_under_way(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Layers that never leave: both sides are given up at once, and the conversation goes on with the next turn."""
    model = Decoder.load(DEMO)
    pools = [KVPool.allocate(model.kv_spec, 8, block_size=16, dtype="float32") for _ in range(2)]
    stations = [Station(model, pool, secret=SECRET, instance=name, config=SMALL)
                for name, pool in zip("pd", pools, strict=True)]  # fmt: skip
    silent = stations[way == "back"].exchange.sender
    send_layer = SendHandle.send_layer
    with stations[0].exchange, stations[1].exchange, monkeypatch.context() as patched:
        conversation = Conversation(*stations)
        patched.setattr("hetkv.runtime.turns.WAIT_S", 1.0)
        patched.setattr(
            SendHandle,
            "send_layer",
            lambda self, *args: None if self.sender is silent else send_layer(self, *args),
        )
        with pytest.raises(WaitTimeoutError):
            conversation.turn([3, 5, 7], 4)
        for station in stations:
            settled(station.exchange.sender, station.exchange.receiver)
        patched.undo()
        said = conversation.tokens
        turn = conversation.turn([11, 13], 4)
        pool = KVPool.allocate(model.kv_spec, 8, block_size=16, dtype="float32")
        assert turn.tokens == generate(model, [*said, 11, 13], 4, pool)
