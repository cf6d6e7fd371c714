"""The oracle's conversions against a table search over exact rational values, which shares nothing with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hetkv.kv.dtypes import DType
from hetkv.kv.layout import KVLayout
from hetkv.kv.spec import LayerSpec
from hetkv.reference import remap as reference
from hetkv.reference.checksum import payload_checksum

# exponent bits, mantissa bits, bias, kind of the codes at the top
FORMATS = {
    DType.FLOAT16: (5, 10, 15, "ieee"),
    DType.BFLOAT16: (8, 7, 127, "ieee"),
    DType.FLOAT8_E4M3FN: (4, 3, 7, "fn"),
    DType.FLOAT8_E4M3FNUZ: (4, 3, 8, "fnuz"),
    DType.FLOAT8_E5M2: (5, 2, 15, "ieee"),
    DType.FLOAT8_E5M2FNUZ: (5, 2, 16, "fnuz"),
}


def magnitudes(dtype: DType) -> np.ndarray:
    """Finite magnitudes of the format by code, as float64 (exact)."""
    exponent_bits, mantissa_bits, bias, kind = FORMATS[dtype]
    codes = np.arange(1 << (exponent_bits + mantissa_bits))
    exponent, mantissa = codes >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    normal = (1 + mantissa / 2.0**mantissa_bits) * 2.0 ** (exponent - bias)
    subnormal = mantissa / 2.0**mantissa_bits * 2.0 ** (1 - bias)
    values = np.where(exponent == 0, subnormal, normal)
    finite = {"ieee": (1 << mantissa_bits) * ((1 << exponent_bits) - 1), "fn": len(codes) - 1, "fnuz": len(codes)}[kind]
    return values[:finite]


def search(values: np.ndarray, dtype: DType) -> tuple[np.ndarray, int]:
    """Nearest code of each value, ties to the even code, clamped to the largest; and how many were clamped."""
    exponent_bits, mantissa_bits, _, kind = FORMATS[dtype]
    table = magnitudes(dtype)
    beyond = table[-1] + (table[-1] - table[-2])  # the value that the next code would have
    table = np.append(table, beyond)
    size = np.minimum(np.abs(np.nan_to_num(values, nan=0.0)).astype(np.float64), 2 * beyond)
    above = np.clip(np.searchsorted(table, size), 1, len(table) - 1)
    below = above - 1
    down, up = size - table[below], table[above] - size
    code = np.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
    clamped = code == len(table) - 1
    code = np.minimum(code, len(table) - 2)
    sign = np.signbit(values) & ~((kind == "fnuz") & (code == 0))
    code = code | np.where(sign, 1 << (exponent_bits + mantissa_bits), 0)
    nan = np.isnan(values)
    return np.where(nan, reference.CANONICAL_NAN[dtype], code), int((clamped & ~nan).sum())


def all_codes(dtype: DType) -> torch.Tensor:
    size = dtype.itemsize
    codes = torch.arange(1 << (8 * size), dtype=torch.int32).to({1: torch.uint8, 2: torch.int16}[size])
    return codes.view(dtype.torch)


def hard_floats(dtype: DType) -> np.ndarray:
    """Float32 values on, and one step to either side of, every value of the format and every tie between two."""
    table = magnitudes(dtype)
    table = np.append(table, min(2 * table[-1] - table[-2], float(np.finfo(np.float32).max)))
    points = np.concatenate([table, (table[1:] + table[:-1]) / 2]).astype(np.float32)
    with np.errstate(over="ignore"):
        points = np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(np.inf))])
    special = np.array([np.inf, np.nan, 3e38, 1e-45, 1e-38, 1.1754944e-38], dtype=np.float32)
    points = np.concatenate([points, special])
    return np.concatenate([points, -points])


@pytest.mark.parametrize("dtype", FORMATS, ids=lambda d: d.value)
def test_codes_read_as_the_format_says(dtype: DType) -> None:
    table = magnitudes(dtype)
    read = all_codes(dtype).to(torch.float64).numpy()
    half = len(read) // 2
    np.testing.assert_array_equal(read[: len(table)], table)
    np.testing.assert_array_equal(read[half + 1 : half + len(table)], -table[1:])
    kind = FORMATS[dtype][3]
    assert np.isnan(read[half]) == (kind == "fnuz")
    rest = read[len(table) : half]
    infinities = 1 if kind == "ieee" else 0
    assert np.isinf(rest).sum() == infinities
    assert np.isnan(rest).sum() == len(rest) - infinities


@pytest.mark.parametrize("target", FORMATS, ids=lambda d: d.value)
def test_encode_is_the_nearest_value(target: DType) -> None:
    generator = torch.Generator().manual_seed(1)
    random_bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    sources = [torch.from_numpy(hard_floats(target)), random_bits]
    sources += [all_codes(source).to(torch.float32) for source in FORMATS]
    for values in sources:
        codes, saturated = reference.encode(values, target)
        want, clamped = search(values.numpy(), target)
        mask = (1 << 8 * target.itemsize) - 1
        np.testing.assert_array_equal(codes.to(torch.int64).numpy() & mask, want)
        assert saturated == clamped


def test_encode_float32_clamps_infinity_and_canonicalises_nan() -> None:
    values = torch.tensor([0x7F800000, -0x00800000, 0x7FFFFFFF, -1, 0x3F800000, 1], dtype=torch.int32).view(
        torch.float32
    )
    codes, saturated = reference.encode(values, DType.FLOAT32)
    assert [code & 0xFFFFFFFF for code in codes.tolist()] == [
        0x7F7FFFFF,
        0xFF7FFFFF,
        0x7FC00000,
        0x7FC00000,
        0x3F800000,
        1,
    ]
    assert saturated == 2


def test_checksum_by_hand() -> None:
    step = 0x9E3779B97F4A7C15
    word = 0x0807060504030201
    x = word ^ (7 + step)
    first = ((x & 0xFFFFFFFF) * (x >> 32) + word) % 2**64
    assert payload_checksum(bytes(range(1, 9)), 7) == first
    tail = 9 ^ ((7 + 2 * step) % 2**64)
    second = (tail & 0xFFFFFFFF) * (tail >> 32) + 9
    assert payload_checksum(bytes(range(1, 10)), 7) == (first + second) % 2**64
    assert payload_checksum(bytes([9]), 7, 8) == second % 2**64


def test_checksum_sees_swapped_duplicated_and_zeroed_words() -> None:
    data = bytes(range(64))
    swapped = data[8:16] + data[:8] + data[16:]
    doubled = data[:8] + data[:8] + data[16:]
    zeroed = data[:24] + bytes(8) + data[32:]
    sums = {payload_checksum(x, 3) for x in (data, swapped, doubled, zeroed, data + bytes(8))}
    assert len(sums) == 5


def test_remap_of_a_small_pool_by_hand() -> None:
    layer = LayerSpec.kv(heads=2, head_dim=2)
    layout = KVLayout.preset("nhd", layer, 2, 2, "uint8").segments["k"]
    memory = torch.arange(24, dtype=torch.uint8)  # 3 blocks of [2 tokens, 2 heads, 2 channels]
    source = reference.Paged(memory, layout, 2, 3, [2, 0], first_token=1)
    wire = reference.Canonical(torch.zeros(8, dtype=torch.uint8), DType.UINT8)
    assert reference.remap(source, wire, tokens=2, heads=2, channels=2) == 0
    # Token 1 is the second of block 2, token 2 the first of block 0.
    assert wire.memory.tolist() == [20, 21, 0, 1, 22, 23, 2, 3]
