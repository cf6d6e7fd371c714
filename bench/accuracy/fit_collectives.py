"""Fit the all-reduce lines of `hetkv/costmodel/data/collectives.yaml` to the kernel measurements in the
`aiconfigurator-core` wheel (Apache-2.0). Needs pandas and pyarrow.

    pip download aiconfigurator-core==0.12.0 --no-deps -d /tmp/aic
    python bench/accuracy/fit_collectives.py /tmp/aic/*.whl > hetkv/costmodel/data/collectives.yaml
"""

from __future__ import annotations

import io
import sys
import zipfile

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

TABLES = {
    "A100-80-SXM": "a100_sxm/comm/vllm/0.14.0",
    "H100-SXM": "h100_sxm/comm/vllm/0.24.0",
    "H200-SXM": "h200_sxm/comm/vllm/0.24.0",
    "B200-SXM": "b200_sxm/comm/vllm/0.24.0",
}


SWITCH_BYTES = 3 * 2**20
"""Between the largest message of the engines' own kernels and the smallest that goes to NCCL in these tables."""


def fit_line(size: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """`(latency_s, s_per_byte)` of the line with the least relative error, robust to single outliers."""
    start = np.log([seconds[0], seconds[-1] / size[-1]])
    found = least_squares(
        lambda x: np.log((np.exp(x[0]) + np.exp(x[1]) * size) / seconds), start, loss="soft_l1", f_scale=0.1
    )
    return float(np.exp(found.x[0])), float(np.exp(found.x[1]))


def fit_lines(size: np.ndarray, seconds: np.ndarray) -> tuple[list[float], float]:
    """The two lines, and their median relative error."""
    small = size < SWITCH_BYTES
    lines = [*fit_line(size[small], seconds[small]), *fit_line(size[~small], seconds[~small])]
    found = np.where(small, lines[0] + lines[1] * size, lines[2] + lines[3] * size)
    return lines, float(np.median(np.abs(found / seconds - 1)))


def main() -> None:
    wheel = zipfile.ZipFile(sys.argv[1])
    print("# All-reduce on one node: small_s + small_s_per_byte n below 3 MiB, large_s + large_s_per_byte n above.")
    print(
        "# Made by bench/accuracy/fit_collectives.py from aiconfigurator-core 0.12 (Apache-2.0), captured-graph rows."
    )
    print("# ranks: [small_s, small_s_per_byte, large_s, large_s_per_byte]   # median error of the fit, sizes")
    for gpu, folder in TABLES.items():
        name = f"aiconfigurator_core/systems/data/{folder}/custom_allreduce_perf.parquet"
        table = pd.read_parquet(io.BytesIO(wheel.read(name)))
        table = table[(table.backend == "vllm_graph") & (table.message_size >= 2048)]
        print(f"{gpu}:\n  source: {folder}")
        for ranks, rows in table.groupby("num_gpus"):
            rows = rows.groupby("message_size").latency.median()
            lines, error = fit_lines(rows.index.to_numpy(float), rows.to_numpy(float) * 1e-3)
            values = ", ".join(f"{v:.4e}" for v in lines)
            print(f"  {ranks}: [{values}]  # {error:.3f}, {len(rows)}")


if __name__ == "__main__":
    main()
