"""`hetkv serve --cluster ray` on a Ray cluster of several nodes, one of which is removed under load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.serving import QUICK, Serving, serving
from tests.serve.test_lifecycle import ask

pytest.importorskip("ray", reason="ray is not installed")

PLAN = """
model: {model}
pools:
  - {{role: prefill, gpu: Left}}
  - {{role: decode, gpu: Right, count: 2}}
link: {{gb_s: 10}}
engine: {{name: hetkv, max_num_seqs: 64, max_num_batched_tokens: 256, kv_dtype: fp32}}
"""
REQUESTS, TOKENS = 60, 24


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Any, list[Any]]]:
    """One node with the GPU type `Left`, three with `Right`: one more than is needed."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        made.add_node(num_cpus=1, resources={"Left": 1})
        rights = [made.add_node(num_cpus=1, resources={"Right": 1}) for _ in range(3)]
        ray.init(address=made.address)
        yield made, rights
    finally:
        ray.shutdown()
        made.shutdown()


def used(node: Any) -> bool:
    """Whether an instance has the node's resource."""
    from ray._private.state import available_resources_per_node

    return not available_resources_per_node()[node.node_id].get("Right", 0)


def up(server: Serving) -> list[str]:
    return sorted(name for name, one in server.health()["instances"].items() if one["up"])


@pytest.mark.timeout(400)
def test_a_node_is_removed_under_load(
    cluster: tuple[Any, list[Any]], checkpoint: tuple[Path, Any], tmp_path: Path
) -> None:
    """No request is lost, and the instance that was there comes back on the node that was free."""
    made, rights = cluster
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN.format(model=checkpoint[0]))
    options = ["--model", str(checkpoint[0]), "--served-name", "tiny", "--port", "0", *QUICK[:2], "--plan", str(plan)]
    with serving(tmp_path / "log", [*options, "--cluster", "ray", "--ray-address", made.address]) as server:
        before = up(server)
        assert [name.split(".")[0] for name in before] == ["decode-0", "decode-1", "prefill-0"]
        assert sorted(map(used, rights)) == [False, True, True]
        victim = next(node for node in rights if used(node))

        async def load() -> list[int]:
            async with httpx.AsyncClient(timeout=200, limits=httpx.Limits(max_connections=None)) as client:
                gate, statuses = asyncio.Semaphore(12), []

                async def one(number: int) -> None:
                    async with gate:
                        statuses.append((await ask(client, server.url, number, TOKENS))[0])

                tasks = [asyncio.create_task(one(number)) for number in range(REQUESTS)]
                while len(statuses) < REQUESTS // 6:
                    await asyncio.sleep(0.02)
                await asyncio.to_thread(made.remove_node, victim, False)
                await asyncio.gather(*tasks)
                return statuses

        assert asyncio.run(load()) == [200] * REQUESTS
        removed, deadline = time.monotonic(), time.monotonic() + 150
        while len(up(server)) < 3 or up(server) == before:  # the last answer may come before the loss is seen
            assert time.monotonic() < deadline, server.log.read_text()
            time.sleep(0.2)
        print(f"all instances are up {time.monotonic() - removed:.1f} s after the last answer")
        after = up(server)
        assert len(set(after) & set(before)) == 2
        assert [name.split(".")[0] for name in after] == ["decode-0", "decode-1", "prefill-0"]
        assert all(used(node) for node in rights if node is not victim)
        server.wait_empty()
        assert server.end() == 0
