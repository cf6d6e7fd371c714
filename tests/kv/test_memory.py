"""Pools over memory of any kind: what is read, what is rejected, and that `import hetkv` needs none of it."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.layer import LayerMemory
from hetkv.kv.layout import KVLayout
from hetkv.kv.memory import Memory
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import Interval, KVSpec, LayerSpec, Segment, Shard

LAYERS, BLOCKS, SIZE, HEADS, DIM = 2, 5, 4, 3, 8
SPEC = KVSpec.uniform(LAYERS, HEADS, DIM)
AXES = "segment block token head channel"
SHAPE = (2, BLOCKS, SIZE, HEADS, DIM)


class Exports:
    """Only what is asked for of a NumPy array: DLPack, or CUDA's interface with the pointers of host memory."""

    def __init__(self, array: np.ndarray, *names: str) -> None:
        self._array = array
        for name in names:
            setattr(self, name, getattr(array, name))


class Cuda:
    """`__cuda_array_interface__` version 3 of an address."""

    def __init__(self, array: np.ndarray, **fields: Any) -> None:
        self.__cuda_array_interface__ = {**array.__array_interface__, "version": 3, **fields}


def arrays(dtype: Any = np.float32) -> list[np.ndarray]:
    """One a layer, every element another value."""
    count = int(np.prod(SHAPE))
    return [(np.arange(count) + layer * count).reshape(SHAPE).astype(dtype) for layer in range(LAYERS)]


def same_places(pool: KVPool, made: list[np.ndarray]) -> None:
    """Every address and stride is the array's own."""
    for layer, array in enumerate(made):
        for part, name in enumerate("kv"):
            segment = pool.layers[layer].layout.segments[name]
            want = array.__array_interface__["data"][0] + part * array.strides[0]
            assert pool.base(layer, name) + segment.offset == want
            assert (segment.block_stride, segment.token_stride, segment.head_stride) == array.strides[1:4]
        assert pool.cache_groups == {0: (SIZE, BLOCKS)}


READERS = {
    "numpy": lambda array: array,
    "torch": torch.from_numpy,
    "dlpack": lambda array: Exports(array, "__dlpack__", "__dlpack_device__"),
    "old dlpack": lambda array: OldDlpack(array),
    "raw": lambda array: Memory(array.ctypes.data, array.shape, array.dtype, array.strides, owner=array),
}


class OldDlpack:
    """An exporter of DLPack 0, whose `__dlpack__` knows no `max_version`."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()

    def __dlpack__(self) -> Any:
        return self._array.__dlpack__()


@pytest.mark.parametrize("reader", READERS)
def test_each_kind_of_memory(reader: str) -> None:
    made = arrays()
    pool = KVPool.from_tensors(SPEC, [READERS[reader](array) for array in made], AXES)
    same_places(pool, made)
    pool.check_destination()
    view = pool.view(1, "v")
    assert np.array_equal(np.asarray(view), made[1][1])
    view[3, 2, 1] = 7
    assert (made[1][1, 3, 2, 1] == 7).all()
    assert pool.device == "cpu"


def test_strides_are_read_from_every_kind() -> None:
    for reader in READERS.values():
        whole = np.zeros((BLOCKS, HEADS, 2, SIZE, DIM + 8), np.float16)
        array = whole[..., :DIM].transpose(2, 0, 3, 1, 4)
        pool = KVPool.from_tensors(KVSpec.uniform(1, HEADS, DIM), [reader(array)], AXES)
        same_places(pool, [array])


def test_memory_mapped(tmp_path: Path) -> None:
    file = tmp_path / "kv"
    mapped = np.memmap(file, np.float32, "w+", shape=(LAYERS, *SHAPE))
    pool = KVPool.from_tensors(SPEC, mapped, f"layer {AXES}")
    same_places(pool, [mapped[0], mapped[1]])
    pool.check_destination()
    again = KVPool.from_tensors(SPEC, np.memmap(file, np.float32, "r", shape=(LAYERS, *SHAPE)), f"layer {AXES}")
    again.check_source()
    with pytest.raises(InputError, match="layer 0, segment 'k': read-only memory cannot be received into"):
        again.check_destination()


def test_a_tensor_over_a_read_only_file_is_found_out(tmp_path: Path) -> None:
    """PyTorch does not say that it is read-only: writing would be the process's end."""
    file = tmp_path / "kv"
    file.write_bytes(bytes(4 * int(np.prod(SHAPE))))
    with open(file, "rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
    with pytest.warns(UserWarning, match="not writable"):
        tensor = torch.frombuffer(mapped, dtype=torch.float32).reshape(SHAPE)
    pool = KVPool.from_tensors(KVSpec.uniform(1, HEADS, DIM), [tensor], AXES)
    pool.check_source()
    with pytest.raises(InputError, match="are not writable memory of this process"):
        pool.check_destination()


def test_a_pointer_to_nothing() -> None:
    pool = KVPool.from_tensors(KVSpec.uniform(1, HEADS, DIM), [Memory(4096, SHAPE, "float32")], AXES)
    with pytest.raises(InputError, match="are not readable memory of this process"):
        pool.check_source()


def test_cuda_array_interface() -> None:
    made = arrays(np.float16)
    pool = KVPool.from_tensors(SPEC, [Cuda(array, stream=1) for array in made], AXES)
    same_places(pool, made)
    assert pool.device == "cuda"
    whole = np.zeros((BLOCKS, HEADS, 2, SIZE, DIM), np.uint16)
    array = whole.transpose(2, 0, 3, 1, 4)
    pool = KVPool.from_tensors(KVSpec.uniform(1, HEADS, DIM), [Cuda(array)], AXES, dtype="bf16")
    same_places(pool, [array])
    assert pool.layers[0].layout.dtype is DType.BFLOAT16
    readonly = Cuda(array, data=(array.ctypes.data, True))
    pool = KVPool.from_tensors(KVSpec.uniform(1, HEADS, DIM), [readonly], AXES, dtype="bf16")
    with pytest.raises(InputError, match="read-only"):
        pool.check_destination()
    with pytest.raises(InputError, match="has no view"):
        pool.view(0, "k")


def test_layers_in_a_mapping_a_list_or_stacked() -> None:
    stacked = np.stack(arrays())
    for given, axes in (
        (stacked, f"layer {AXES}"),
        ({0: stacked[0], np.int64(1): stacked[1]}, AXES),
        ((stacked[0], stacked[1]), AXES),
        ([{"k": layer[0], "v": layer[1]} for layer in stacked], "block token head channel"),
        ([(layer[0], layer[1]) for layer in stacked], "block token head channel"),
        ({"k": stacked[:, 0], "v": stacked[:, 1]}, "layer block token head channel"),
        (Memory(stacked.ctypes.data, stacked.shape, "float32"), f"layer {AXES}"),
        (Exports(stacked, "__dlpack__", "__dlpack_device__"), f"layer {AXES}"),
        (torch.from_numpy(stacked), f"layer {AXES}"),
    ):
        pool = KVPool.from_tensors(SPEC, given, axes)
        assert np.array_equal(np.asarray(pool.view(1, "v")), stacked[1, 1])


def test_layers_of_a_stage_are_counted_from_its_first() -> None:
    spec = KVSpec.uniform(4, HEADS, DIM)
    pool = KVPool.from_tensors(spec, arrays(), AXES, shard=Shard.of(spec, pp=2, pp_rank=1))
    assert list(pool.layers) == [2, 3]
    with pytest.raises(InputError, match=r"2 tensors for the 4 layers \[0, 1, 2, 3\]"):
        KVPool.from_tensors(spec, arrays(), AXES)


def test_axes_of_different_layers() -> None:
    spec = KVSpec([LayerSpec.kv(HEADS, DIM), LayerSpec.latent(DIM, 4, group=1), LayerSpec.state(2, 24, group=2)])
    given = [np.zeros(SHAPE, np.float16), np.zeros((9, SIZE, DIM + 4), np.float16), np.zeros((3, 2, 24), np.uint8)]
    with pytest.raises(InputError, match="layer 1: "):
        KVPool.from_tensors(spec, given, AXES)
    axes = {0: AXES, 1: "block token channels", 2: "block head channel"}
    with pytest.raises(InputError, match="layer 1: the channels axis holds 12 channels"):
        KVPool.from_tensors(KVSpec([spec.layers[0], LayerSpec.latent(DIM, 5, group=1)]), given[:2], axes)
    assert KVPool.from_tensors(spec, given, axes).cache_groups == {0: (SIZE, BLOCKS), 1: (SIZE, 9), 2: (1, 3)}
    with pytest.raises(InputError, match=r"axes are not given for layers \[2\]"):
        KVPool.from_tensors(spec, given, {0: AXES, 1: "block token channels"})


def test_blocks_are_counted_along_each_tensors_own_axis() -> None:
    spec = KVSpec.uniform(1, 2, DIM)
    k, v = np.zeros((50, SIZE, 2, DIM), np.float16), np.zeros((2, 50, SIZE, DIM), np.float16)
    axes = {"k": "block token head channel", "v": "head block token channel"}
    assert KVPool.from_tensors(spec, {0: {"v": v, "k": k}}, axes).cache_groups[0].num_blocks == 50
    with pytest.raises(InputError, match="different block counts"):
        KVPool.from_tensors(spec, {0: {"k": k[:40], "v": v}}, axes)
    with pytest.raises(InputError, match="not for segment 'v'"):
        KVPool.from_tensors(spec, {0: {"k": k, "v": v}}, {"k": axes["k"]})


def test_dtypes() -> None:
    for name in ("bf16", "bfloat16", torch.bfloat16, "torch.bfloat16"):
        assert DType.parse(name) is DType.BFLOAT16
    for name in (np.float16, np.dtype("float16"), "half", torch.float16, DType.FLOAT16):
        assert DType.parse(name) is DType.FLOAT16
    with pytest.raises(InputError, match="dtype 'float64' is not known"):
        DType.parse(np.float64)
    spec = KVSpec.uniform(1, HEADS, DIM)
    raw = np.zeros(SHAPE, np.uint16)
    with pytest.raises(InputError, match="'uint16': give dtype"):
        KVPool.from_tensors(spec, [raw], AXES)
    pool = KVPool.from_tensors(spec, [raw], AXES, dtype="bfloat16")
    assert pool.layers[0].layout.dtype is DType.BFLOAT16
    assert pool.view(0, "k").shape == SHAPE[1:]
    assert (
        KVPool.from_tensors(spec, [raw.view(np.uint8)[..., ::2]], AXES, dtype="fp8").layers[0].layout.dtype.itemsize
        == 1
    )
    with pytest.raises(InputError, match="holds uint16, not float32"):
        KVPool.from_tensors(spec, [raw], AXES, dtype="float32")
    with pytest.raises(InputError, match="holds float32, not bfloat16"):
        KVPool.from_tensors(spec, [np.zeros(SHAPE, np.float32)], AXES, dtype="bf16")
    with pytest.raises(InputError, match="big-endian"):
        KVPool.from_tensors(spec, [np.zeros(SHAPE, ">f4")], AXES)


def test_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    spec = KVSpec.uniform(1, HEADS, DIM)
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2fnuz"):
        array = np.zeros(SHAPE, getattr(ml_dtypes, name))
        pool = KVPool.from_tensors(spec, [array], AXES)
        assert pool.layers[0].layout.dtype.value == name
        view = pool.view(0, "v")
        view[1, 2, 0, 3] = 1.5
        assert view.dtype == array.dtype
        assert array[1, 1, 2, 0, 3] == 1.5


def rejected(pool: KVPool, match: str) -> None:
    pool.check_source()
    with pytest.raises(InputError, match=match):
        pool.check_destination()


def test_memory_that_overlaps() -> None:
    one = KVSpec.uniform(1, HEADS, DIM)
    axes = "block token head channel"
    k = np.zeros(SHAPE[1:], np.float32)
    rejected(
        KVPool.from_tensors(one, [{"k": k, "v": k}], axes), "layer 0, segment 'k' and layer 0, segment 'v' overlap"
    )
    whole = np.zeros(SHAPE, np.float32)
    rejected(KVPool.from_tensors(SPEC, [whole, whole], AXES), "layer 0, segment '.' and layer 1, segment '.' overlap")
    for source in (np.broadcast_to(k[:1], k.shape), torch.zeros(1, *SHAPE[2:]).expand(*SHAPE[1:])):
        pool = KVPool.from_tensors(one, [{"k": source, "v": k}], axes)
        rejected(pool, "read-only|overlap each other")
    sliding = torch.zeros(SHAPE[1:]).as_strided(SHAPE[1:], (SIZE * DIM, DIM, 4, 1))
    rejected(KVPool.from_tensors(one, [{"k": sliding, "v": k}], axes), "segment 'k': its elements overlap")
    shifted = np.zeros(k.size + 8, np.float32)
    parts = {"k": shifted[: k.size].reshape(k.shape), "v": shifted[8:].reshape(k.shape)}
    rejected(KVPool.from_tensors(one, [parts], axes), "overlap")


def test_memory_that_interleaves_does_not_overlap() -> None:
    """Layers inside of a block, heads of K and V in turns, packed rows, and cache groups that share a buffer."""
    spec = KVSpec.uniform(6, HEADS, DIM)
    inside = np.zeros((BLOCKS, 6, SIZE, HEADS, 2 * DIM), np.float16)
    KVPool.from_tensors(spec, inside, "block layer token head channels").check_destination()
    turns = np.zeros((BLOCKS, 6, SIZE, 2 * HEADS, DIM), np.float16)
    parts = {"k": turns[..., ::2, :], "v": turns[..., 1::2, :]}
    KVPool.from_tensors(spec, parts, "block layer token head channel").check_destination()
    for name in ("nhd_interleaved", "packed_hnd", "rocm", "hnd"):
        for scale in (None, "token", "token_head"):
            kind = "float8_e4m3fn" if scale else "bfloat16"
            pool = KVPool.allocate(KVSpec.uniform(2, 2, 16), 3, layout=name, dtype=kind, scale=scale)
            pool.check_destination()
    mla = KVSpec([LayerSpec.latent(512, 64)] * 2)
    KVPool.allocate(mla, 3, dtype="fp8", latent_layout="fp8_ds_mla").check_destination()
    hybrid = KVSpec([LayerSpec.kv(HEADS, DIM), LayerSpec.kv(HEADS, DIM, group=1)])
    whole = np.zeros(SHAPE, np.float16)
    KVPool.from_tensors(hybrid, [whole, whole], AXES).check_destination()


def test_overlap_is_found_wherever_it_is() -> None:
    """Against the plain truth: a set of all bytes of all elements."""
    rng = np.random.default_rng(0)
    base = np.zeros(4096, np.uint8)
    found = {True: 0, False: 0}
    for _ in range(300):
        spec = KVSpec([LayerSpec("kv", [Segment("a", 1, 4), Segment("b", 1, 4)])])
        parts, touched = {}, []
        for name in "ab":
            inner = int(rng.choice([4, 4, 8, 12]))
            token, block = (int(rng.choice([1, 2, 3])) * inner * 3, inner) if rng.random() < 0.3 else (inner, 0)
            block = block or token * int(rng.choice([2, 3, 4]))
            memory = Memory(
                base.ctypes.data + int(rng.integers(0, 80)), (2, 2, 4), "int8", (block, token, 1), room=3000
            )
            parts[name] = memory
            touched += [
                memory.address + b * block + t * token + c for b in range(2) for t in range(2) for c in range(4)
            ]
        pool = KVPool.from_tensors(spec, [parts], "block token channel")
        overlap = len(set(touched)) != len(touched)
        found[overlap] += 1
        if overlap:
            rejected(pool, "overlap")
        else:
            pool.check_destination()
    assert min(found.values()) > 30


def test_numbers_and_sequences_of_any_kind() -> None:
    assert KVSpec([LayerSpec.kv(1, 8)]) == KVSpec((LayerSpec.kv(1, 8),))
    assert LayerSpec("kv", [Segment("k", 1, 8)]).segments == (Segment("k", 1, 8),)
    with pytest.raises(InputError, match="layers are a sequence of LayerSpec"):
        KVSpec(LayerSpec.kv(1, 8))
    with pytest.raises(InputError, match="layers are a sequence of LayerSpec"):
        KVSpec([1, 2])
    pool = KVPool.allocate(SPEC, np.int64(3), block_size=np.array([4]))
    assert pool.cache_groups == {0: (4, 3)}
    for wrong in ("3", 1.5, [1, 2], 0, None):
        with pytest.raises(InputError, match="num_blocks"):
            KVPool.allocate(SPEC, wrong)
    assert "3 blocks of 4 tokens" in repr(pool)
    with pytest.raises(InputError, match="is not memory"):
        KVPool.from_tensors(SPEC, ["x", "y"], AXES)
    with pytest.raises(InputError, match="tensors are given by layer index or by segment name"):
        KVPool.from_tensors(SPEC, {1.5: 1, "k": 2}, AXES)
    with pytest.raises(InputError, match="axes 'block' of one tensor for all layers need an axis `layer`"):
        KVPool.from_tensors(SPEC, np.zeros(3), "block")


def test_a_state_of_several_parts() -> None:
    layer = LayerSpec.state(4, {"conv": 96, "ssm": 256})
    pool = KVPool.allocate(KVSpec([layer]), 3, shard=Shard(Interval(0, 1), (Interval(1, 3),)))
    assert {name: (part.heads, part.channels) for name, part in pool.layers[0].layout.segments.items()} == {
        "conv": (2, 96),
        "ssm": (2, 256),
    }


def test_memory_by_hand_is_checked() -> None:
    buffer = ctypes.create_string_buffer(64)
    at = ctypes.addressof(buffer)
    assert Memory(at, (2, 4), "float32").strides == (16, 4)
    for wrong in ((0, (2,), "int8"), (at, (0,), "int8"), (at, (2, 2), "int8", (1,)), (at, (2,), "int8", (-1,))):
        with pytest.raises(InputError):
            Memory(*wrong)
    with pytest.raises(InputError, match="integers"):
        Memory(1.5, (2,), "int8")
    layout = KVLayout.preset("nhd", LayerSpec.kv(1, 8), 1, 4, "int8")
    with pytest.raises(InputError, match="the layout reaches 96 bytes, there are 64"):
        KVPool(KVSpec([LayerSpec.kv(1, 8)]), Shard.whole(KVSpec([LayerSpec.kv(1, 8)])),
               {0: LayerMemory(layout, 3, dict.fromkeys("kv", Memory(at, (64,), "uint8")))})  # fmt: skip


def run(code: str) -> str:
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert made.returncode == 0, made.stderr
    return made.stdout


def test_numpy_pools_need_no_torch() -> None:
    out = run(
        "import sys; sys.modules['torch'] = None\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name: None if name == 'torch' else real(name)\n"
        "from hetkv import KVPool, KVSpec\n"
        "pool = KVPool.allocate(KVSpec.uniform(1, 2, 8), 3, dtype='float16')\n"
        "print(type(pool.view(0, 'k')).__module__, pool.view(0, 'k').shape)"
    )
    assert out == "numpy (3, 16, 2, 8)\n"


def test_import_is_light() -> None:
    out = run(
        "import sys, time; began = time.process_time(); import hetkv; took = time.process_time() - began\n"
        "print(took, *({'torch', 'numpy', 'msgspec', 'hetkv.core', 'hetkv._core'} & set(sys.modules)))"
    )
    took, *loaded = out.split()
    assert not loaded
    assert float(took) < 0.05


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no advice on huge pages")
@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_large_arrays_of_a_pool_begin_at_a_huge_page_and_small_ones_do_not_have_to(framework: str) -> None:
    huge, block = 2 << 20, 16 * HEADS * DIM * 4
    for blocks in (4, 3 * huge // 2 // block + 1):
        spec = KVSpec.uniform(1, HEADS, DIM)
        pool = KVPool.allocate(spec, blocks, layout="nhd", block_size=16, dtype="fp32", framework=framework)
        for segment in ("k", "v"):
            view = pool.view(0, segment)
            flat = np.asarray(view)
            assert flat.nbytes == blocks * block
            assert not flat.any()
            assert flat.nbytes < huge or flat.ctypes.data % huge == 0
            view[:] = 1
            assert flat.all()
