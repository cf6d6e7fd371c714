"""Files of any of the known kinds to rows of closed loops, or to observations of an engine's steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hetkv.costmodel.calibration.datasets import ServingRow
from hetkv.costmodel.calibration.logs import bench_serve, engine_log, metrics, request_log
from hetkv.costmodel.calibration.logs.observations import Observation, Setup
from hetkv.costmodel.textfile import read_utf8
from hetkv.errors import InputError

KINDS = "a request log (JSON lines), scrapes of /metrics, a log of vLLM or SGLang, or a result of `vllm bench serve`"


def read(
    paths: Sequence[Path], setup: Setup, until_s: float | None = None
) -> tuple[list[ServingRow], list[Observation]]:
    """Rows and observations of all files together; scrapes in the order of `paths`.

    `until_s`: seconds from the first request of a request log on; nothing that was known later is used.
    """
    rows: list[ServingRow] = []
    seen: list[Observation] = []
    scrapes = []
    for path in paths:
        text, origin = read_utf8(path), str(path)
        if request_log.looks_like(text):
            log = request_log.parse(text, origin)
            seen += request_log.observations(log, None if until_s is None else float(log.queued.min()) + until_s)
        elif bench_serve.looks_like(text):
            rows += bench_serve.rows(text, origin, setup)
        elif metrics.looks_like(text):
            scrapes.append(metrics.parse(text, origin))
        elif engine_log.looks_like(text):
            seen += engine_log.observations(text, origin)
        else:
            raise InputError(f"{path}: not {KINDS}")
    if scrapes:
        seen += metrics.observations(scrapes, ", ".join(path.name for path in paths))
    if not rows and not seen:
        raise InputError(f"{', '.join(map(str, paths))}: nothing to calibrate with: too few tokens, or no steady load")
    return rows, seen
