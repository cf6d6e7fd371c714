"""`TransferConfig(verify="pool")`: what was unpacked is read again, so that a pool which does not hold it is seen.

The other writer here is a second request that was given the same blocks, as an engine's block manager does by mistake:
both are in one bundle, so that the second one's unpack comes before the first one's blocks are read again.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hetkv.errors import ChecksumError, InputError, PoolChecksumError
from hetkv.kv.pool import KVPool
from hetkv.kv.scale import ScaleLayout
from hetkv.kv.spec import KVSpec
from hetkv.transport.config import TransferConfig
from tests.device import host
from tests.transport.peers import WAIT_S, check_transfer, connected, randomise, settled

SPEC = KVSpec.uniform(2, 2, 64)
BLOCKS = 16
PAYLOAD, POOL = TransferConfig(), TransferConfig(verify="pool")
STATIC = ScaleLayout(values=(0.5,))
BF16 = {"dtype": "bf16"}
POOLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the same dtype": (BF16, BF16),
    "widened": (BF16, {"dtype": "fp32"}),
    "narrowed by the sender": ({"dtype": "fp32"}, BF16),
    "static scales": ({"dtype": "fp8_e4m3fn", "scale": STATIC}, BF16),
    "static scales on both sides": (
        {"dtype": "fp8_e4m3fn", "scale": STATIC},
        {"dtype": "fp8_e4m3fn", "scale": ScaleLayout(values=(0.25,))},
    ),
    "scales of a token and head": ({"dtype": "int8", "scale": "token_head"}, {"dtype": "int8", "scale": "token_head"}),
    "scales that heads share": (BF16, {"dtype": "int8", "scale": "token"}),
    "scales applied": ({"dtype": "int8", "scale": "token_head"}, BF16),
    "scales filled in": ({"dtype": "fp8_e4m3fn", "scale": STATIC}, {"dtype": "fp8_e4m3fn", "scale": "token_head"}),
}
every_pool = pytest.mark.parametrize(("source", "destination"), POOLS.values(), ids=list(POOLS))


def pools(source: dict[str, Any], destination: dict[str, Any]) -> tuple[KVPool, KVPool]:
    made = KVPool.allocate(SPEC, BLOCKS, layout="nhd", block_size=16, **source)
    generator = torch.Generator().manual_seed(1)
    for memory in made.layers.values():
        for tensor in memory.tensors.values():
            tensor.copy_(torch.randint(1, 64, tensor.shape, dtype=torch.uint8, generator=generator))
    return made, KVPool.allocate(SPEC, 8, layout="hnd", block_size=32, **destination)


@every_pool
def test_another_writer_to_the_same_blocks_is_seen(source: dict[str, Any], destination: dict[str, Any]) -> None:
    here, there = pools(source, destination)
    for receiver_config, seen in ((POOL, True), (PAYLOAD, False)):
        with connected([here], [there], PAYLOAD, receiver_config) as ([sender], [receiver]):
            sent = [sender.send(name, [first, first + 1], 32) for name, first in (("a", 0), ("b", 4))]
            asked = [receiver.receive(name, [3], 32) for name in "ab"]
            receiver.receive("last", [7], 16)
            last = sender.send("last", [9], 16)
            last.send_layers()
            last.wait(WAIT_S)  # both tickets have come
            sender.batch(sent).send_layers()
            asked[1].wait(WAIT_S)
            if not seen:
                asked[0].wait(WAIT_S)  # with the second one's KV, and nobody knows
                continue
            with pytest.raises(PoolChecksumError, match="the pool does not hold what was unpacked of layer"):
                asked[0].wait(WAIT_S)
            with pytest.raises(ChecksumError):
                sent[0].wait(WAIT_S)
            sent[1].wait(WAIT_S)
            settled(sender, receiver)


@every_pool
@pytest.mark.parametrize("tokens", [1, 31, 200])
def test_what_is_right_is_not_rejected(source: dict[str, Any], destination: dict[str, Any], tokens: int) -> None:
    config = TransferConfig(verify="pool", slot_bytes=8192, window_bytes=4 * 8192)
    here, there = pools(source, destination)
    with connected([here], [there], config) as ([sender], [receiver]):
        blocks = list(range(-(-tokens // 32)))
        handle = sender.send("request", list(range(-(-tokens // 16))), tokens)
        handle.send_layers()
        receiver.receive("request", blocks, tokens).wait(WAIT_S)
        handle.wait(WAIT_S)
        settled(sender, receiver)


def test_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same remaps, by a device's kernels."""
    host.on_device(monkeypatch)
    here, there = host.pools()
    config = TransferConfig(slot_bytes=4096, window_bytes=4 * 4096, staging_slots=2, verify="pool")
    with connected([here], [there], config) as ([sender], [receiver]):
        check_transfer(here, there, sender, receiver, 150)
        settled(sender, receiver)


@pytest.mark.parametrize("verify", ["twice", 1, None])
def test_what_is_no_way_of_verifying_is_rejected(verify: Any) -> None:
    with pytest.raises(InputError, match="verify"):
        TransferConfig(verify=verify)


def test_random_bytes_of_every_code() -> None:
    """NaN of all kinds too: nothing is converted, so every bit is compared."""
    here = randomise(KVPool.allocate(SPEC, BLOCKS, layout="nhd", block_size=16, dtype="bf16"), 1)
    there = KVPool.allocate(SPEC, 8, layout="hnd", block_size=32, dtype="bf16")
    with connected([here], [there], POOL) as ([sender], [receiver]):
        check_transfer(here, there, sender, receiver, 250)
