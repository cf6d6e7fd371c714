"""Requests through real processes: `moved` starts a prefill and a decode instance and returns what they generate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hetkv.runtime.plan import InstancePlan, SideOptions
from hetkv.runtime.processes import link, running
from hetkv.transport.config import TransferConfig

POOLS = {
    "prefill": SideOptions(block_size=16, layout="nhd", dtype="float32"),
    "decode": SideOptions(block_size=64, layout="rocm", dtype="float32"),
}


def moved(
    plans: Sequence[InstancePlan],
    model: Path,
    prompts: Sequence[list[int]],
    count: int,
    chunk: int | None = None,
    transfer: TransferConfig | None = None,
) -> list[list[int]]:
    """Tokens of each prompt, prefilled by the first plan's instance and decoded by the second's. All ranks agree."""
    tokens = []
    longest = max(map(len, prompts)) + count
    with running(plans, model=str(model), max_tokens=longest, chunk=chunk, transfer=transfer) as (source, destination):
        link([source, destination])
        for index, prompt in enumerate(prompts):
            name = f"request-{index}"
            destination.call("accept", name, source.plan.name, len(prompt), count)
            first = {rank.first_token for rank in source.call("prefill", name, prompt)}
            assert len(first) == 1
            decoded = destination.call("decode", name, first.pop(), count)
            source.call("finish", name)
            assert all(rank.tokens == decoded[0].tokens for rank in decoded)
            tokens.append(decoded[0].tokens)
    return tokens
