"""Instances as processes of this machine: `Local` starts them, and starts those again that end by a fault."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from hetkv.runtime.forkserver import end_with_parent, forkserver_context, interrupt_later
from hetkv.serve.instance import InstanceConfig, run

LEAVE_S = 10.0
"""Time that instances have to end by themselves."""
AGAIN_S = 1.0
log = logging.getLogger("hetkv.serve.local")


class Local:
    """The processes of some instances."""

    def __init__(self, configs: Sequence[InstanceConfig]) -> None:
        self._configs = list(configs)
        self._processes: list[Any] = []
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="hetkv-local", daemon=True)
        self.failed = ""
        """Why an instance cannot be started, whatever is tried."""

    def start(self, scheduler: str) -> None:
        """Start all, to register at `scheduler`. Call it in the main thread."""
        self._configs = [msgspec.structs.replace(config, scheduler=scheduler) for config in self._configs]
        self._context = forkserver_context()
        for config in self._configs:
            with interrupt_later():
                self._processes.append(self._start(config))
        self._watcher.start()

    @property
    def count(self) -> int:
        """Instances that there should be."""
        return len(self._configs)

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name in the plan."""
        pairs = zip(self._configs, self._processes, strict=True)
        return {config.plan.name: process.pid for config, process in pairs}

    def close(self) -> None:
        """End all."""
        self._closing.set()
        if self._watcher.is_alive():
            self._watcher.join()
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + LEAVE_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()

    def _start(self, config: InstanceConfig) -> Any:
        process = self._context.Process(target=_run, args=(config,), name=config.plan.name)
        process.start()
        log.info("instance %s has process %d", config.plan.name, process.pid)
        return process

    def _watch(self) -> None:
        """Body of a thread."""
        while not self._closing.wait(0.2):
            for number, process in enumerate(self._processes):
                if process.exitcode is None or self.failed:
                    continue
                name = self._configs[number].plan.name
                if process.exitcode in (0, REJECTED):
                    self.failed = f"{name} ended with {process.exitcode}" if process.exitcode else ""
                    continue
                log.warning("%s ended with %s; it is started again", name, process.exitcode)
                if self._closing.wait(AGAIN_S):
                    return
                self._processes[number] = self._start(self._configs[number])


REJECTED = 2
"""Exit status of an instance that cannot be as it is configured: trying again would not help."""


def _run(config: InstanceConfig) -> None:
    """Body of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and ends its instances
    threading.Thread(target=end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    os._exit(run(config))
