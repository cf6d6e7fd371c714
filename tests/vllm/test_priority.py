"""What a producer sends first, by vLLM's priority: real pools, no engine."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hetkv.integrations.vllm.metadata import Metadata, Send
from hetkv.integrations.vllm.metrics import HetKVStats
from hetkv.integrations.vllm.scheduler import Producing
from hetkv.integrations.vllm.sending import Sending
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.vllm.test_preemption import CONTENT, SECRET, WAIT_S, caches_of

TOKENS = 32


@pytest.mark.parametrize(("given", "sent"), [(0, 0), (-7, -7), (1 << 40, 2**31 - 1), (-(1 << 40), -(2**31))])
def test_a_clients_priority_is_cut_to_32_bits(given: int, sent: int) -> None:
    request = cast(Any, SimpleNamespace(request_id="r", num_prompt_tokens=TOKENS, priority=given))
    producing = Producing(request, "t", "n", CONTENT, concurrent=False, kept=True)
    blocks = [3, 4]
    made = producing.send(TOKENS, (blocks,))
    blocks.append(5)  # the scheduler goes on
    assert made == Send("r", "n", CONTENT, TOKENS, TOKENS, ([3, 4],), sent)


def test_lower_priorities_leave_first() -> None:
    (ours,), (theirs,) = caches_of(1), caches_of(1)
    config = TransferConfig(slot_bytes=1 << 16, window_bytes=1 << 16, bundle_frames=1, trace=True)
    with Sender(ours.pool, secret=SECRET, instance="p", config=config) as sender:
        with Receiver(theirs.pool, secret=SECRET, instance="d") as receiver:
            receiver.connect(sender.listen())
            producer = Sending(sender, ours, HetKVStats(), lambda: None, lambda held: held)
            priorities = {"a": 5, "b": -1, "c": 0}
            sends = [
                Send(name, name, CONTENT, TOKENS, TOKENS, ([2 * at, 2 * at + 1],), priority)
                for at, (name, priority) in enumerate(priorities.items())
            ]
            asked = [receiver.receive(send.name, list(send.blocks[0]), TOKENS, content=CONTENT) for send in sends]
            producer.begin_step(Metadata(computing=sends, computes=True))
            handles = {out.tx.handle: name for name, out in producer._out.items() if out.tx is not None}
            time.sleep(0.3)  # the tickets have come
            producer.end_step()
            for handle in asked:
                handle.wait(WAIT_S)
            order = [handles[span[1]] for span in sender.engine.take_trace() if span[0] == "pack"]
    assert [name for at, name in enumerate(order) if name not in order[:at]] == ["b", "c", "a"]
