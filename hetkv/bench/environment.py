"""What a measurement ran on: for the head of every benchmark's JSON."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import hetkv


def environment() -> dict[str, Any]:
    """Device, versions, commit and time, as JSON types."""
    return {
        "device": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {
            "hetkv": hetkv.__version__,
            "python": platform.python_version(),
            "kernel": platform.release(),
            **{name: found for name in ("torch", "libucx-cu13", "libucx-cu12") if (found := _installed(name))},
        },
        **({"gpus": cards} if (cards := gpus()) else {}),
        "commit": commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def gpus() -> list[str]:
    """Name, memory and driver of each NVIDIA GPU, as its driver's tool lists them; empty without one."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.strip().splitlines()


def cpu_model() -> str:
    """Name of the CPU as the system gives it, with family, model and stepping where the name says little."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name", platform.machine())
    numbers = [facts.get(key, "?") for key in ("cpu family", "model", "stepping")]
    return f"{name} (family {numbers[0]}, model {numbers[1]}, stepping {numbers[2]})"


def commit() -> str:
    """Commit of the source tree that hetkv runs from, with `-dirty` where files differ; empty outside a checkout."""
    root = Path(hetkv.__file__).resolve().parent.parent
    if (root / "COMMIT").is_file():  # an exported tree
        return (root / "COMMIT").read_text().strip()[:12]
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
