"""Serving instances in this process for tests: a model, a pool, an engine, and what it reports."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hetkv.control.tls import TlsConfig
from hetkv.runtime.alone import Alone
from hetkv.runtime.batching import Limits
from hetkv.runtime.block_manager import BlockManager
from hetkv.runtime.commands import Link, Linked, Report
from hetkv.runtime.engine import Engine
from hetkv.runtime.plan import InstancePlan, SideOptions
from hetkv.runtime.rank import RankConfig
from hetkv.runtime.rank_processes import ranks_of

SECRET = b"a secret of tests"
UNIT = 16
"""Tokens of a prefix that instances of tests share."""
DEFAULTS = Limits(64, 256)


def save_tiny(path: Path, vocabulary: int = 199, context: int = 512) -> LlamaForCausalLM:
    """A random Llama of two layers, which a step takes about a millisecond of."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=context, initializer_range=0.4, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    return model


def reference(model: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of `transformers`."""
    inputs = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


class Instance:
    """An engine whose reports are kept: `tokens` and `finished` by sequence."""

    def __init__(self, name: str, model: Path, *, block: int = 16, layout: str = "nhd", kv_tokens: int = 4096,
                 limits: Limits = DEFAULTS, unit: int = UNIT, tp: int = 1, pp: int = 1,
                 tls: TlsConfig | None = None) -> None:  # fmt: skip
        plan = InstancePlan(
            name=name, role="", pool=SideOptions(block_size=block, layout=layout, dtype="float32"), tp=tp, pp=pp
        )  # fmt: skip
        self.name = name
        self.ranks: Any = ranks_of(RankConfig(plan=plan, model=str(model), kv_tokens=kv_tokens, secret=SECRET, tls=tls))
        self.reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self.blocks = BlockManager(self.ranks.facts[0].blocks, block, unit)
        self.engine = Engine(self.ranks, self.blocks, limits, self.reports.put)
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.linked: dict[str, Linked] = {}
        self.last: Report | None = None
        self.on_first: Callable[[str, int], None] = lambda id, token: None
        """Called with the first token of each sequence."""
        self.engine.start()

    def link(self, source: Instance) -> None:
        assert self.linked_to(source) == Linked(source.name)

    def linked_to(self, source: Instance) -> Linked:
        """What becomes of the attempt."""
        self.engine.submit(Link(source.name, tuple(facts.address for facts in source.ranks.facts)))
        wait_until([self], lambda: source.name in self.linked)
        return self.linked.pop(source.name)

    def read(self) -> None:
        """Take what was reported."""
        while not self.reports.empty():
            report = self.last = self.reports.get()
            assert not report.error, report.error
            for output in report.outputs:
                if output.id not in self.tokens:
                    self.on_first(output.id, output.token.id)
                self.tokens.setdefault(output.id, []).append(output.token.id)
                if output.finish:
                    self.finished[output.id] = output.finish
            self.failed.update(report.failed)
            self.linked.update({linked.name: linked for linked in report.linked})

    def is_empty(self) -> bool:
        """Nothing is left here of any sequence."""
        engine: Any = self.engine
        tables = [engine._sequences, engine._transfers, engine._of, engine._known_blocks]
        if isinstance(self.ranks, Alone):
            rank = self.ranks.rank
            tables += [rank._sending, rank._receiving]
        return self.blocks.available == self.blocks.total and not any(tables)


def wait_until(instances: list[Instance], done: Callable[[], bool], seconds: float = 60.0) -> None:
    """Read reports until `done`."""
    deadline = time.monotonic() + seconds
    while True:
        for instance in instances:
            instance.read()
        if done():
            return
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.002)


@contextmanager
def instances(*made: Instance) -> Iterator[tuple[Instance, ...]]:
    """Close them."""
    try:
        yield made
    finally:
        for instance in made:
            instance.engine.close()
