"""Every path of the kernels once, small, for compute-sanitizer: `compute-sanitizer --tool memcheck python3 FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from hetkv.kv.dtypes import DType
from hetkv.kv.layout import KVLayout
from hetkv.kv.spec import LayerSpec
from hetkv.transport.backends import backends
from tests.remap.cases import Side, pool, wire
from tests.remap.gpu_cases import check_on
from tests.remap.scaled_cases import Case, Place, sensible
from tests.remap.test_scaled_gpu import check_on as check_scaled


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
    count += scaled()
    print(f"{count} moves equal the oracle")
    return 0


def scaled() -> int:
    """Codes with scales on the wire, in groups for clusters of lanes and in others, both ways."""
    count = 0
    for preset, channels, groups, tokens in (
        ("nhd", 128, 1, 77), ("hnd", 96, 3, 33), ("rocm", 64, 2, 50), ("nhd", 576, 1, 20), ("hnd", 20, 4, 31),
    ):  # fmt: skip
        for dtype, code in ((DType.BFLOAT16, DType.FLOAT8_E4M3FN), (DType.FLOAT32, DType.INT8)):
            layout = KVLayout.preset(preset, LayerSpec.kv(3, 16, channels), 3, 16, dtype).segments["v"]
            paged = Place(pool(layout, 16, 6, [5, 0, 3, 1, 4], 1, 3), None)
            scales = wire(DType.FLOAT32, tokens, 3, groups, 2)
            sensible(scales, groups, 3)
            codes = wire(code, tokens, 3, channels, 4)
            payload = Place(codes, Side(scales.memory, DType.FLOAT32, num_blocks=groups))
            shape = (tokens, 3, channels, None)
            check_scaled("cuda", [Case(paged, payload, *shape, False, "destination")])
            check_scaled("cuda", [Case(payload, paged, *shape, False, "source")])
            check_scaled("cuda", [Case(paged, payload, *shape, True, "destination")])
            count += 3
    return count


if __name__ == "__main__":
    sys.exit(main())
