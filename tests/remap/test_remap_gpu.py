"""The GPU kernels against the oracle: on every machine as host code, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetkv.core import core as _core
from hetkv.errors import InputError, UnsupportedError
from hetkv.kv.dtypes import DType
from hetkv.kv.layout import KVLayout
from hetkv.kv.spec import LayerSpec
from hetkv.reference import remap as reference
from hetkv.transport.backends import backends
from tests.remap.cases import Side, pool, random_bytes, wire
from tests.remap.gpu_cases import check_on, device_of, emulated_backend
from tests.remap.test_remap import FLOATS, KV_PRESETS, moves, segment_pool


def cuda() -> object:
    """The parameter of the real backend."""
    found = backends()["cuda"]
    reason = found.why or ("" if torch.cuda.is_available() else "PyTorch sees no GPU")
    return pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(bool(reason), reason=reason)])


every_backend = pytest.mark.parametrize("backend", [pytest.param(emulated_backend(), id="emulated"), cuda()])
FAST = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@every_backend
@FAST
@given(moves(convert=False), st.integers(0, 3), st.integers(0, 2**64 - 1))
def test_moves_are_byte_exact(
    backend: str, move: tuple[Side, Side, int, int, int, None], max_blocks: int, seed: int
) -> None:
    source, destination, tokens, heads, channels, _ = move
    check_on(backend, source, destination, tokens, heads, channels, seed=seed, max_blocks=max_blocks)


@every_backend
@FAST
@given(moves(convert=True), st.integers(0, 3), st.integers(0, 2**64 - 1))
def test_conversions_are_the_oracle_s(
    backend: str, move: tuple[Side, Side, int, int, int, list[float] | None], max_blocks: int, seed: int
) -> None:
    source, destination, tokens, heads, channels, scale = move
    check_on(backend, source, destination, tokens, heads, channels, multipliers=scale, seed=seed, max_blocks=max_blocks)


@every_backend
@pytest.mark.parametrize("segment", ["k", "v"])
@pytest.mark.parametrize("preset", KV_PRESETS)
def test_every_preset_with_the_wire(backend: str, preset: str, segment: str) -> None:
    for dtype, wire_dtype in (
        (DType.BFLOAT16, DType.BFLOAT16),
        (DType.FLOAT8_E4M3FN, DType.FLOAT8_E4M3FN),
        (DType.FLOAT32, DType.FLOAT32),
        (DType.BFLOAT16, DType.FLOAT8_E4M3FN),
        (DType.FLOAT32, DType.FLOAT16),
    ):
        for size, tokens in ((16, 150), (64, 333), (1, 37), (128, 7)):
            paged = segment_pool(preset, segment, dtype, 3, 128, size, tokens, 1)
            payload = wire(wire_dtype, tokens, 3, 128, 2)
            check_on(backend, paged, payload, tokens, 3, 128, seed=5)
            check_on(backend, payload, paged, tokens, 3, 128, seed=5)


@every_backend
@pytest.mark.parametrize("channels", [24, 64, 72, 200, 576])
@pytest.mark.parametrize("first_token", [0, 3, 16, 29])
def test_turned_layouts_from_any_token(backend: str, first_token: int, channels: int) -> None:
    layout = KVLayout.preset("rocm", LayerSpec.kv(2, 64, channels), 2, 16, DType.BFLOAT16).segments["v"]
    for tokens in (1, 12, 75):
        need = -(-(first_token + tokens) // 16)
        paged = pool(layout, 16, need + 1, list(range(need, 0, -1)), 3, first_token)
        for dtype in (DType.BFLOAT16, DType.FLOAT8_E5M2):
            payload = wire(dtype, tokens, 2, channels, 4)
            check_on(backend, paged, payload, tokens, 2, channels)
            check_on(backend, payload, paged, tokens, 2, channels)


@every_backend
@pytest.mark.parametrize("to", FLOATS, ids=lambda d: d.value)
@pytest.mark.parametrize("start", FLOATS, ids=lambda d: d.value)
def test_every_code_converts(backend: str, start: DType, to: DType) -> None:
    """Every code of up to 16 bits, in vectors with others like it, so that the fast way sees what it can take."""
    count = 1 << min(16, 8 * start.itemsize)
    source = wire(start, 1, 1, count, 11)
    if start.itemsize < 4:
        codes = torch.arange(count, dtype=torch.int32).to({1: torch.uint8, 2: torch.int16}[start.itemsize])
        source.body[: count * start.itemsize] = codes.view(torch.uint8)
    else:  # every exponent, with random mantissas
        generator = torch.Generator().manual_seed(7)
        low = torch.randint(0, 1 << 15, (count,), generator=generator, dtype=torch.int64)
        codes = (torch.arange(count, dtype=torch.int64) << 16 | low << 1).to(torch.int32)
        source.body[: count * 4] = codes.view(torch.uint8)
    destination = segment_pool("nhd", "k", to, 1, count, 1, 1, 12)
    for multipliers in ([1.0], [0.37], [2.0**-14], [2.0**-130], [2.0**120]):
        check_on(backend, source, destination, 1, 1, count, multipliers=multipliers)
    if start is not to:
        check_on(backend, source, destination, 1, 1, count)


@every_backend
@pytest.mark.parametrize("to_dtype", [DType.BFLOAT16, DType.FLOAT8_E4M3FN], ids=lambda d: d.value)
@pytest.mark.parametrize("preset", ["rocm", "packed_nhd", "latent", "hnd"])
def test_several_jobs_are_one_frame(backend: str, preset: str, to_dtype: DType) -> None:
    """K and V in one launch; and more jobs than a launch holds, which report once."""
    heads, tokens = (4, 330) if preset != "latent" else (1, 700)
    layer = LayerSpec.latent(512, 64) if preset == "latent" else LayerSpec.kv(heads, 128, 128)
    layout = KVLayout.preset(preset, layer, heads, 16, DType.BFLOAT16)
    need = -(-tokens // 16)
    device = device_of(backend)
    for repeats in (1, 5):
        jobs, checks, want, clamped, offset = [], [], 0, 0, 0
        for repeat in range(repeats):
            for name, part in layout.segments.items():
                memory = random_bytes(part.extent(16, need), repeat)
                source = Side(memory, part.dtype, part, 16, need, list(range(need)))
                expected = wire(to_dtype, tokens, heads, part.channels, len(name))
                there = Side(memory.to(device), part.dtype, part, 16, need, list(range(need)))
                payload = Side(expected.memory.clone().to(device), to_dtype)
                clamped += reference.remap(source.oracle(), expected.oracle(), tokens, heads, part.channels)
                size = tokens * heads * part.channels * to_dtype.itemsize
                want += _core.checksum(expected.body[:size].numpy(), offset, 6)
                sides = there.kernel(tokens, part.channels), payload.kernel(tokens, part.channels)
                count = {"tokens": tokens, "heads": heads, "channels": part.channels}
                jobs.append(_core.RemapJob(*sides, **count, wire="destination", wire_offset=offset))
                checks.append((there, payload, expected))
                offset += size
        run = _core.DeviceRemap(backend, 0, jobs)
        run.launch(torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0, 6)
        assert run.result() == (want % 2**64, clamped)
        assert all(torch.equal(payload.memory.cpu(), expected.memory) for _, payload, expected in checks)


@every_backend
@pytest.mark.parametrize(
    ("frames", "tokens", "max_blocks"), [(2, 40, 0), (3, 5, 1), (64, 17, 0), (64, 700, 7), (33, 1, 2)]
)
@pytest.mark.parametrize("to_dtype", [DType.BFLOAT16, DType.FLOAT8_E4M3FN])
def test_frames_of_one_launch_report_alone(
    backend: str, frames: int, tokens: int, max_blocks: int, to_dtype: DType
) -> None:
    """Jobs by value and in a table, on few and on many thread blocks: each frame has its own seed, sum and count."""
    layer = LayerSpec.kv(2, 64)
    layout = KVLayout.preset("nhd", layer, 2, 16, DType.BFLOAT16)
    device = device_of(backend)
    jobs, checks, want = [], [], []
    for number in range(frames):
        count = max(1, tokens - number % 3)
        need = -(-count // 16)
        total, clamped, offset = 0, 0, 0
        for name, part in layout.segments.items():
            memory = random_bytes(part.extent(16, need), number)
            source = Side(memory, part.dtype, part, 16, need, list(range(need))[::-1])
            expected = wire(to_dtype, count, 2, part.channels, len(name))
            there = Side(memory.to(device), part.dtype, part, 16, need, list(range(need))[::-1])
            payload = Side(expected.memory.clone().to(device), to_dtype)
            clamped += reference.remap(source.oracle(), expected.oracle(), count, 2, part.channels)
            size = count * 2 * part.channels * to_dtype.itemsize
            total += _core.checksum(expected.body[:size].numpy(), offset, 6 + number)
            sides = there.kernel(count, part.channels), payload.kernel(count, part.channels)
            shape = {"tokens": count, "heads": 2, "channels": part.channels}
            jobs.append(_core.RemapJob(*sides, **shape, wire="destination", wire_offset=offset))
            checks.append((there, payload, expected))
            offset += size
        want.append((total % 2**64, clamped))
    run = _core.DeviceRemap(backend, 0, jobs, [2] * frames)
    for _ in range(2):
        run.launch(torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0, 6, max_blocks)
        assert run.results() == want
    assert all(torch.equal(payload.memory.cpu(), expected.memory) for _, payload, expected in checks)


@every_backend
def test_nothing_to_do_reports_nothing(backend: str) -> None:
    run = _core.DeviceRemap(backend, 0, [])
    run.launch()
    assert run.result() == (0, 0)


@every_backend
def test_fills_repeat_one_value(backend: str) -> None:
    """What the engine does to scales that the wire does not carry: a source whose strides are all 0."""
    device = device_of(backend)
    one, scales = torch.ones(1, device=device), torch.zeros(40, 3, 2, device=device)
    source = _core.SegmentMap(
        base=one.data_ptr(), block_stride=0, token_stride=0, head_stride=0, outer_stride=0, inner_stride=0,
        block_size=0, pack=2, dtype=DType.FLOAT32.code,
    )  # fmt: skip
    pages = _core.SegmentMap(
        base=scales.data_ptr(), block_stride=4 * 24, token_stride=24, head_stride=8, outer_stride=0, inner_stride=4,
        block_size=4, pack=2, dtype=DType.FLOAT32.code,
    )  # fmt: skip
    job = _core.RemapJob(
        _core.RemapSide(source),
        _core.RemapSide(pages, [9, 0, 3], first_token=1),
        tokens=9, heads=3, channels=2, multipliers=[0.5, 2.0, 8.0],
    )  # fmt: skip
    run = _core.DeviceRemap(backend, 0, [job])
    run.launch()
    assert run.result() == (0, 0)
    want = torch.zeros(40, 3, 2)
    want[[37, 38, 39, 0, 1, 2, 3, 12, 13]] = torch.tensor([0.5, 2.0, 8.0])[:, None]
    assert torch.equal(scales.cpu(), want)


@every_backend
def test_bad_input_is_rejected_by_name(backend: str) -> None:
    with pytest.raises(InputError, match="invalid device ordinal"):
        _core.DeviceRemap(backend, 99, [])
    with pytest.raises(InputError, match="backend 'metal' is not known"):
        _core.DeviceRemap("metal", 0, [])
    assert _core.device_info(backend, 0)["multiprocessors"] > 0
    assert _core.pointer_info(backend, torch.zeros(8).data_ptr())["kind"] == "host"


def test_a_host_without_backends_works_and_says_why() -> None:
    code = (
        "from hetkv.transport.backends import backends; found = backends();"
        "assert list(found) == ['cuda', 'hip'] and all(b.devices == 0 and b.why for b in found.values()), found;"
        "from hetkv.core import core\n"
        "try: core.DeviceRemap('cuda', 0, [])\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {**os.environ, "HETKV_BACKENDS": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{UnsupportedError.__name__} the cuda backend cannot be used here: ")
