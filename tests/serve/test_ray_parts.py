"""What `hetkv serve --cluster ray` does without a cluster: the secret's file, faults, and the scheduler's address."""

from __future__ import annotations

import stat
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hetkv.control.secret import SecretFile
from hetkv.runtime.plan import InstancePlan, SideOptions
from hetkv.serve.instance import InstanceConfig
from hetkv.serve.ray_cluster import RayInstances, held


class Ray:
    """Stands for the module: runs end at once, each with the next status."""

    exceptions = SimpleNamespace(RayError=RuntimeError)

    def __init__(self, statuses: list[int]) -> None:
        self.statuses, self.events = statuses, []  # type: ignore[var-annotated]
        self.run = SimpleNamespace(remote=self._ran)

    def _ran(self, config: InstanceConfig, secret: bytes) -> object:
        self.events.append(("run", config.scheduler))
        return object()

    def remote(self, *_: Any, **__: Any) -> Any:
        return self

    options = remote

    def cluster_resources(self) -> dict[str, float]:
        return {}

    def wait(self, runs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return runs, []

    def get(self, run: Any) -> int:
        return self.statuses.pop(0)

    def kill(self, actor: Any, no_restart: bool) -> None:
        self.events.append(("kill", no_restart))


def instances(ray: Ray) -> RayInstances:
    """With one instance, on a node that is reached at 10.0.0.1."""
    made = RayInstances.__new__(RayInstances)
    plan = InstancePlan(name="decode", role="decode", pool=SideOptions(block_size=16, layout="nhd", dtype="float32"))
    made._ray, made._configs, made._secret = ray, [InstanceConfig(plan=plan, model="m", scheduler="")], b"s" * 16
    made.host, made.failed, made._actors, made._runs = "10.0.0.1", "", [], {}
    made._closing = threading.Event()
    made._watcher = threading.Thread(target=made._watch)
    return made


def test_the_secret_is_on_no_disk() -> None:
    path = held(b"a secret of sixteen")
    assert SecretFile(path).accepted() == (b"a secret of sixteen",)
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    assert Path(path).stat().st_nlink == 0


def test_an_instance_that_failed_gets_another_process_and_the_node_s_address() -> None:
    ray = Ray([1, 0])
    made = instances(ray)
    made.start("0.0.0.0:7100")
    made._watcher.join(30)
    run = ("run", "10.0.0.1:7100")
    assert ray.events == [run, ("kill", False), run]
    assert not made.failed
