"""Many simulations at once: a grid over fields of the plan and options of the traffic."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from hetkv.errors import InputError
from hetkv.interrupt import kept_from_children
from hetkv.simulator.deployment import Plan, build_pools, parse_plan
from hetkv.simulator.metrics import Slo
from hetkv.simulator.run import simulate
from hetkv.simulator.traffic.sources import Traffic

TRAFFIC_FIELDS = tuple(f.name for f in msgspec.structs.fields(Traffic))
MAX_POINTS = 100_000
Found = TypeVar("Found")


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """`NAME=V1,V2,...` or `NAME=LOW:HIGH[:STEP]` (both ends included) to the name and the values in order."""
    name, equals, values = text.partition("=")
    if not equals or not name or not values:
        raise InputError(f"--sweep {text!r}: expected NAME=V1,V2,... or NAME=LOW:HIGH[:STEP]")
    parts = values.split(":")
    if len(parts) in (2, 3):
        try:
            low, high, step = (*map(float, parts), 1.0)[:3]
        except ValueError:
            raise InputError(f"--sweep {text!r}: {values!r} is not a range of numbers") from None
        if not (step > 0 and low <= high and (high - low) / step < MAX_POINTS):
            raise InputError(f"--sweep {text!r}: expected LOW <= HIGH and STEP > 0")
        count = int((high - low) / step + 1e-9) + 1
        return name, [_number(low + i * step) for i in range(count)]
    return name, [_value(v.strip()) for v in values.split(",")]


def _number(value: float) -> float | int:
    value = round(value, 9)
    return int(value) if value == int(value) else value


def _value(text: str) -> Any:
    try:
        return _number(float(text))
    except ValueError:
        return {"true": True, "false": False}.get(text, text)


def grid(axes: list[tuple[str, list[Any]]]) -> list[dict[str, Any]]:
    """Every combination of the axes' values, the last axis fastest."""
    names = [name for name, _ in axes]
    if len(set(names)) < len(names):
        raise InputError(f"--sweep: {next(n for n in names if names.count(n) > 1)} is given twice")
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(values for _, values in axes))]


def apply(point: dict[str, Any], plan: Plan, traffic: Traffic, origin: str) -> tuple[Plan, Traffic]:
    """The plan and the traffic with the point's values in place.

    A name is an option of the traffic (`rate`), or a path in the plan: `engine.max_num_seqs`, `link.gb_s`, or a pool's
    name and field (`decode.count`).
    """
    document = msgspec.to_builtins(plan)
    pools = {p.name: i for i, p in enumerate(plan.pools)}
    changes: dict[str, Any] = {}
    for name, value in point.items():
        if name in TRAFFIC_FIELDS:
            changes[name] = str(value) if name in ("prompt_tokens", "output_tokens") else value
            continue
        head, *path = name.split(".")
        node = document["pools"][pools[head]] if head in pools else document
        path = path if head in pools else [head, *path]
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise InputError(f"--sweep {name}: `{part}` has no fields")
        if not path:
            raise InputError(f"--sweep {name}: name a field of the pool, such as {name}.count")
        node[path[-1]] = value
    try:
        traffic = msgspec.convert({**msgspec.structs.asdict(traffic), **changes}, Traffic)
    except msgspec.ValidationError as error:
        raise InputError(f"--sweep: {error}") from None
    names = ", ".join(f"{k}={v}" for k, v in point.items())
    return parse_plan(document, f"{origin} with {names}"), traffic


def one(plan: Plan, traffic: Traffic, seed: int, slo: Slo, origin: str) -> dict[str, Any]:
    """The summary of one simulation; runs in a worker."""
    return simulate(plan, traffic.build(), seed, slo, origin).summary


def sweep(
    points: list[dict[str, Any]],
    plan: Plan,
    traffic: Traffic,
    seed: int = 0,
    slo: Slo | None = None,
    origin: str = "plan",
    jobs: int = -1,
    backend: str = "loky",
    on_done: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Simulate every point, on `jobs` processes (-1: one per core) or on a Ray cluster; summaries in order of `points`.

    All points use the same seed, so they see the same arrivals. `on_done(n)` is called, in
    any thread, as they end. Every point's plan and options are checked before the first one runs.
    """
    tasks = [(*apply(point, plan, traffic, origin), seed, slo or Slo(), origin) for point in points]
    for changed_plan, changed_traffic, *_ in tasks:
        build_pools(changed_plan, origin)
        if changed_traffic.trace is None:
            changed_traffic.build()
    return run_all(one, tasks, jobs, backend, on_done)


def run_all(
    function: Callable[..., Found],
    tasks: Sequence[tuple[Any, ...]],
    jobs: int = -1,
    backend: str = "loky",
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Found]:
    """`function(*task)` of every task, in order, on `jobs` processes (-1: one per core) or on a Ray cluster.

    `on_done(n)` is called, in any thread, as they end. What a task raises is raised here.
    """
    from joblib import Parallel, delayed

    class Watched(Parallel):  # type: ignore[misc]
        watched = False

        def print_progress(self) -> None:
            if self.watched:
                on_done(self.n_completed_tasks)

    with _backend(backend, jobs), Watched(n_jobs=jobs) as pool:
        with kept_from_children():
            pool([delayed(int)()])  # starts the processes, which leave Ctrl-C to this one
        pool.watched = True
        found: list[Found] = pool(delayed(function)(*task) for task in tasks)
    return found


@contextmanager
def _backend(name: str, jobs: int) -> Iterator[None]:
    from joblib import parallel_config

    if name == "ray":
        try:
            from ray.util.joblib import register_ray
        except ImportError:
            raise InputError("--backend ray: the package `ray` is not installed (pip install ray)") from None
        register_ray()
    with parallel_config(backend=name, n_jobs=jobs, inner_max_num_threads=1 if name == "loky" else None):
        yield
