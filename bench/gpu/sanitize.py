"""Every path of the kernels once, small, for compute-sanitizer: `compute-sanitizer --tool memcheck python3 FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from hetkv.kv.dtypes import DType
from hetkv.kv.layout import KVLayout
from hetkv.kv.spec import LayerSpec
from hetkv.transport.backends import backends
from tests.remap.cases import pool, wire
from tests.remap.gpu_cases import check_on


def main() -> int:
    """Moves and conversions of even and odd shapes between every layout and the wire, both ways."""
    if not backends()["cuda"].devices:
        print(backends()["cuda"].why)
        return 2
    count = 0
    for channels, tokens, first in ((128, 77, 5), (80, 33, 0), (7, 50, 3)):
        layer = LayerSpec.kv(3, channels)
        for preset in ("nhd", "hnd", "packed_nhd", "rocm"):
            for segment in ("k", "v"):
                if preset == "rocm" and segment == "k" and channels % 16:
                    continue
                for dtype, wire_dtype in (
                    (DType.BFLOAT16, DType.BFLOAT16),
                    (DType.BFLOAT16, DType.FLOAT8_E4M3FN),
                    (DType.FLOAT8_E5M2, DType.FLOAT16),
                    (DType.FLOAT32, DType.FLOAT32),
                ):
                    if preset == "rocm" and channels % 16:
                        layer = LayerSpec.kv(3, 16, channels)
                    layout = KVLayout.preset(preset, layer, 3, 16, dtype).segments[segment]
                    need = -(-(tokens + first) // 16)
                    paged = pool(layout, 16, need, list(range(need - 1, -1, -1)), 1, first)
                    payload = wire(wire_dtype, tokens, 3, channels, 2)
                    check_on("cuda", paged, payload, tokens, 3, channels)
                    check_on("cuda", payload, paged, tokens, 3, channels)
                    count += 2
    print(f"{count} moves equal the oracle")
    return 0


if __name__ == "__main__":
    sys.exit(main())
