"""Instances as actors of a Ray cluster: `RayInstances`, which `hetkv serve --cluster ray` has in place of `Local`.

Ray places an instance on a node that has the GPU type which the plan names, as a resource of that name, one for each
rank (`ray start --resources '{"H200": 8}'`), and starts it again where there is room when its node or its process is
lost. Instances register with the scheduler and exchange KV as everywhere; Ray carries neither.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import msgspec

from hetkv.control.address import Address
from hetkv.errors import InputError
from hetkv.serve.instance import InstanceConfig
from hetkv.serve.local import REJECTED

WATCH_S = 0.5
log = logging.getLogger("hetkv.serve.ray")


class _Actor:
    """What Ray runs."""

    def run(self, config: InstanceConfig, secret: bytes) -> int:
        """One instance on this node, until it ends; its exit status."""
        import ray
        import torch

        from hetkv.serve.instance import run

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        device = "cuda:0" if torch.cuda.device_count() else "cpu"  # Ray shows a process only the GPUs that it gave it
        return run(
            msgspec.structs.replace(
                config, plan=msgspec.structs.replace(config.plan, device=device),
                host=ray.util.get_node_ip_address(), secret_file=held(secret),
            )
        )  # fmt: skip


def held(secret: bytes) -> str:
    """Path of a file with the secret, mode 600, that is on no disk and ends with this process, however that ends."""
    file = os.memfd_create("hetkv-secret")
    os.fchmod(file, 0o600)
    os.write(file, secret)
    return f"/proc/{os.getpid()}/fd/{file}"


class RayInstances:
    """The actors of some instances. `address` is that of a Ray cluster; `secret` is shared with the scheduler.

    Raises `InputError` where Ray is not installed, no cluster answers, or an instance has several ranks.
    """

    def __init__(self, configs: Sequence[InstanceConfig], address: str, secret: bytes) -> None:
        try:
            import ray
        except ImportError:
            raise InputError('--cluster ray needs Ray: pip install "hetkv[ray]"') from None
        for config in configs:
            if config.plan.ranks > 1:
                raise InputError(f"{config.plan.name}: --cluster ray starts instances of one rank")
        try:
            ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError) as error:
            raise InputError(f"--ray-address {address}: {error}") from None
        self._ray, self._configs, self._secret = ray, list(configs), secret
        self.host: str = ray.util.get_node_ip_address()
        """Where this node is reached by the others."""
        self.failed = ""
        """Why an instance cannot be started, whatever is tried."""
        self._actors: list[Any] = []
        self._runs: dict[Any, int] = {}
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="hetkv-ray", daemon=True)

    @property
    def count(self) -> int:
        """Instances that there should be."""
        return len(self._configs)

    def start(self, scheduler: str) -> None:
        """Ask Ray for all of them, to register at `scheduler`."""
        at = Address.parse(scheduler)
        if at.host in ("0.0.0.0", "::"):  # every address of this node: the others need one of them
            scheduler = str(Address(self.host, at.port))
        self._configs = [msgspec.structs.replace(config, scheduler=scheduler) for config in self._configs]
        gpus = int(self._ray.cluster_resources().get("GPU", 0) > 0)
        remote = self._ray.remote(_Actor)
        for number, config in enumerate(self._configs):
            actor = remote.options(
                name=f"hetkv-{os.getpid()}-{config.plan.name}", num_cpus=0, num_gpus=gpus,
                resources={config.gpu: 1} if config.gpu else None, max_restarts=-1, max_task_retries=-1,
            ).remote()  # fmt: skip
            self._actors.append(actor)
            self._run(number)
        self._watcher.start()

    def close(self) -> None:
        """End all."""
        self._closing.set()
        if self._watcher.is_alive():
            self._watcher.join()
        for actor in self._actors:
            self._ray.kill(actor, no_restart=True)
        self._ray.shutdown()

    def _run(self, number: int) -> None:
        self._runs[self._actors[number].run.remote(self._configs[number], self._secret)] = number

    def _watch(self) -> None:
        """Body of a thread: those that end by a fault of their own begin again; Ray sees to those that are lost."""
        while not (self._closing.is_set() or self.failed):
            ended, _ = self._ray.wait(list(self._runs), timeout=WATCH_S)
            for run in ended:
                number = self._runs.pop(run)
                name = self._configs[number].plan.name
                try:
                    status = self._ray.get(run)
                except self._ray.exceptions.RayError as error:
                    self.failed = f"{name}: {str(error).strip().splitlines()[-1]}"
                    continue
                if status == REJECTED:
                    self.failed = f"{name} ended with {status}"
                elif status and not self._closing.wait(1.0):
                    log.warning("%s ended with %s; it is started again", name, status)
                    # In another process: in this one a GPU that has failed would stay as it is.
                    self._ray.kill(self._actors[number], no_restart=False)
                    self._run(number)
            if not self._runs:
                return
