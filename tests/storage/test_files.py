"""Files of KV: damaged ones are rejected by name, places of fsspec, what the files lack, what is of another content."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hetkv import errors
from hetkv.core import core
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec, Shard
from hetkv.reference.framefile import read_frames
from hetkv.storage import Saved, load, save
from hetkv.storage.places import writing
from hetkv.transport.content import content_digest

SPEC = KVSpec.uniform(num_layers=3, num_kv_heads=4, head_dim=32)
TOKENS = 40
CONTENT = content_digest(range(TOKENS))
BLOCKS = [4, 1, 2]
FRAME_BYTES = 1 << 14
"""32 tokens of a layer."""


def source(shard: Shard | None = None, dtype: str = "bfloat16", seed: int = 0) -> KVPool:
    """A pool of random values in blocks of 16."""
    pool = KVPool.allocate(SPEC, 6, dtype=dtype, shard=shard)
    generator = torch.Generator().manual_seed(seed)
    for layer in pool.layers:
        for name in ("k", "v"):
            view = pool.view(layer, name)
            view.copy_(torch.randn(view.shape, generator=generator))
    return pool


def target(dtype: str = "bfloat16", shard: Shard | None = None) -> KVPool:
    return KVPool.allocate(SPEC, 20, layout="hnd", block_size=8, dtype=dtype, shard=shard)


def values(pool: KVPool, blocks: list[int], layer: int, name: str) -> torch.Tensor:
    """`[tokens, heads, channels]` of a sequence."""
    view = pool.view(layer, name)[torch.tensor(blocks)]
    return view.reshape(-1, *view.shape[2:])[:TOKENS]


def same(a: KVPool, b: KVPool) -> bool:
    return all(
        torch.equal(values(a, BLOCKS, layer, name), values(b, [7, 3, 5, 0, 1], layer, name))
        for layer in range(3)
        for name in ("k", "v")
    )


def read(place: Any, pool: KVPool, **options: Any) -> int:
    return load(place, pool, [7, 3, 5, 0, 1], TOKENS, content=CONTENT, **options)


def written(**options: Any) -> bytes:
    file = io.BytesIO()
    save(file, source(), BLOCKS, TOKENS, content=CONTENT, **options)
    return file.getvalue()


def test_a_file_is_what_the_reference_reads(tmp_path: Path) -> None:
    path = tmp_path / "kv.hkv"
    saved = save(path, source(), BLOCKS, TOKENS, content=CONTENT, frame_bytes=FRAME_BYTES)
    frames = list(read_frames(io.BytesIO(path.read_bytes())))
    assert saved == Saved(len(frames), path.stat().st_size)
    assert {prelude.request_id for prelude, _, _ in frames} == {CONTENT}
    assert len(frames) == 3 * 2  # of 32 and 8 tokens
    pool = target()
    assert read(path, pool) == 0
    assert same(source(), pool)


@pytest.mark.parametrize("url", ["memory://kv/a.hkv", "file://{}/a.hkv", "simplecache::memory://kv/b.hkv"])
def test_places_of_fsspec(url: str, tmp_path: Path) -> None:
    url = url.format(tmp_path)
    if "simplecache" in url:
        save(url.partition("::")[2], source(), BLOCKS, TOKENS, content=CONTENT)
    else:
        save(url, source(), BLOCKS, TOKENS, content=CONTENT)
    pool = target()
    read(url, pool)
    assert same(source(), pool)


def test_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs", reason="the extra `s3` is not installed")
    server = pytest.importorskip("moto.server", reason="moto, a server of S3's protocol for tests, is not installed")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    try:
        host, port = running.get_host_and_port()
        options = {"client_kwargs": {"endpoint_url": f"http://{host}:{port}", "region_name": "eu-central-1"}}
        import s3fs

        system = s3fs.S3FileSystem(**options)
        system.mkdir("kv-bucket")
        for rank, shard in enumerate(Shard.ranks(SPEC, tp=2)):
            save(f"s3://kv-bucket/kv/{rank}.hkv", source(shard), BLOCKS, TOKENS, content=CONTENT, options=options)
        pool = target()
        read([f"s3://kv-bucket/kv/{rank}.hkv" for rank in range(2)], pool, options=options)
        for rank, shard in enumerate(Shard.ranks(SPEC, tp=2)):
            for layer in range(3):
                heads = slice(*shard.heads[layer])
                assert torch.equal(
                    values(source(shard), BLOCKS, layer, "k"), values(pool, [7, 3, 5, 0, 1], layer, "k")[:, heads]
                ), rank
        with pytest.raises(errors.InputError, match="there is no such file"):
            read("s3://kv-bucket/kv/9.hkv", target(), options=options)
    finally:
        running.stop()


def test_every_truncation_is_rejected() -> None:
    data = written(frame_bytes=FRAME_BYTES)
    rng = random.Random(1)
    for length in {0, 1, core.FRAME_BYTES - 1, core.FRAME_BYTES, len(data) - 1, *rng.sample(range(len(data)), 100)}:
        with pytest.raises((errors.MalformedError, errors.TransferError), match=r"cut short|the files lack layer"):
            read(io.BytesIO(data[:length]), target())


def test_a_file_cut_between_two_frames_is_rejected() -> None:
    data = written(frame_bytes=FRAME_BYTES)
    *_, (_, frame, _) = read_frames(io.BytesIO(data))
    cut = data[: -core.FRAME_BYTES - frame.payload_length]
    with pytest.raises(errors.TransferError, match=r"the files lack layer 2, head 0, tokens \[32, 40\)"):
        read(io.BytesIO(cut), target())


def test_every_flipped_bit_is_rejected() -> None:
    data = written(frame_bytes=FRAME_BYTES)
    rng = random.Random(2)
    pool = target()
    for at in [*range(0, 8 * core.FRAME_BYTES, 5), *rng.sample(range(8 * len(data)), 200)]:
        bad = bytearray(data)
        bad[at // 8] ^= 1 << at % 8
        with pytest.raises(errors.HetkvError, match=r"frame [0-9]+ at byte [0-9]+: ") as caught:
            read(io.BytesIO(bad), pool)
        kinds = errors.MalformedError, errors.UnsupportedError, errors.AuthenticationError, errors.ChecksumError
        assert isinstance(caught.value, kinds), at


def test_nothing_of_a_damaged_frame_reaches_the_pool() -> None:
    data = bytearray(written())
    data[core.FRAME_BYTES + 100] ^= 1
    pool = target()
    with pytest.raises(errors.ChecksumError, match="the file: frame 0 at byte 0: payload has the checksum"):
        read(io.BytesIO(data), pool)
    assert not any(pool.view(layer, name).any() for layer in range(3) for name in ("k", "v"))


def test_frames_in_another_order_or_twice_are_rejected() -> None:
    data = written()
    size = len(data) // 3
    with pytest.raises(errors.AuthenticationError, match="frame 0 at byte 0: sequence is 1, not 0"):
        read(io.BytesIO(data[size:]), target())
    with pytest.raises(errors.AuthenticationError, match=r"frame 1 at byte .*: sequence is 0, not 1"):
        read(io.BytesIO(data[:size] * 2), target())


def test_key_and_content_are_compared() -> None:
    with pytest.raises(errors.AuthenticationError, match="MAC"):
        read(io.BytesIO(written(key=b"k" * 16)), target())
    read(io.BytesIO(written(key=b"k" * 16)), target(), key=b"k" * 16)
    other = content_digest(range(1, TOKENS + 1))
    with pytest.raises(errors.ContentError, match=f"its content is {CONTENT.hex()}, not {other.hex()}"):
        load(io.BytesIO(written()), target(), [0, 1, 2, 3, 4], TOKENS, content=other)
    with pytest.raises(errors.InputError, match="content"):
        save(io.BytesIO(), source(), BLOCKS, TOKENS, content=bytes(16))
    with pytest.raises(errors.InputError, match="key of a file: 16 bytes"):
        save(io.BytesIO(), source(), BLOCKS, TOKENS, content=CONTENT, key=b"short")


def test_another_model_is_rejected_by_name() -> None:
    for spec, text in [
        (KVSpec.uniform(2, 4, 32), "layer: this side has 2 layers"),
        (KVSpec.uniform(3, 4, 64), r"layers\[0\].k.channels: this side has 64, the peer has 32"),
        (KVSpec.uniform(3, 2, 32), r"layers\[0\].heads: this side has 2, the peer has \[0, 4\)"),
    ]:
        with pytest.raises(errors.IncompatibleError, match=text):
            load(io.BytesIO(written()), KVPool.allocate(spec, 3), [0, 1, 2], TOKENS, content=CONTENT)


def test_replicas_and_missing_ranks() -> None:
    files = []
    for shard in Shard.ranks(SPEC, tp=8):  # each head twice
        files.append(io.BytesIO())
        save(files[-1], source(shard), BLOCKS, TOKENS, content=CONTENT)
        files[-1].seek(0)
    read(files, target())
    for file in files:
        file.seek(0)
    with pytest.raises(errors.TransferError, match=r"the files lack layer 0, head 3, tokens \[0, 40\)"):
        read(files[:6], target())


def test_what_is_cached_is_not_read() -> None:
    pool = target()
    pool.view(0, "k").fill_(3.0)
    read(io.BytesIO(written(frame_bytes=FRAME_BYTES)), pool, num_cached_tokens=17)
    found = values(pool, [7, 3, 5, 0, 1], 0, "k")
    assert (found[:17] == 3.0).all()
    assert torch.equal(found[17:], values(source(), BLOCKS, 0, "k")[17:])


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> bytes:
        raise OSError("no space left")

    save(tmp_path / "kept.hkv", source(), BLOCKS, TOKENS, content=CONTENT)
    before = (tmp_path / "kept.hkv").read_bytes()
    monkeypatch.setattr(core, "pack_frame", fail)
    for place in (tmp_path / "kept.hkv", tmp_path / "new.hkv", f"file://{tmp_path}/url.hkv"):
        with pytest.raises(OSError, match="no space left"):
            save(place, source(), BLOCKS, TOKENS, content=CONTENT)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.hkv"]
    assert (tmp_path / "kept.hkv").read_bytes() == before


def test_a_file_that_takes_little_at_a_time() -> None:
    class Unbuffered(io.RawIOBase):
        def __init__(self, room: int) -> None:
            self.data, self.room = bytearray(), room

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            taken = bytes(data)[: min(1000, self.room - len(self.data))]
            self.data += taken
            return len(taken)

    whole = written()
    file = Unbuffered(len(whole))
    save(file, source(), BLOCKS, TOKENS, content=CONTENT)  # type: ignore[arg-type]
    assert bytes(file.data) == whole
    with pytest.raises(OSError, match="takes no more bytes"):
        save(Unbuffered(len(whole) - 1), source(), BLOCKS, TOKENS, content=CONTENT)  # type: ignore[arg-type]


def test_two_writers_of_one_path(tmp_path: Path) -> None:
    path = tmp_path / "kv.hkv"
    with writing(path) as first:
        first.write(b"first")
        with writing(path) as second:
            second.write(b"the second one")
        first.write(b", still")
    assert path.read_bytes() == b"first, still"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_of_places(tmp_path: Path) -> None:
    with pytest.raises(errors.InputError, match=r"missing.hkv: there is no such file"):
        read(tmp_path / "missing.hkv", target())
    with pytest.raises(errors.InputError, match=r"nothing://a.hkv: Protocol not known: nothing"):
        read("nothing://a.hkv", target())


def test_a_pool_of_numpy_arrays_of_another_dtype() -> None:
    memory, blocks = np.zeros((3, 2, 5, 8, 4, 32), np.float32), [4, 3, 2, 0, 1]
    pool = KVPool.from_tensors(SPEC, memory, "layer segment block token head channel")
    load(io.BytesIO(written()), pool, blocks, TOKENS, content=CONTENT)
    want = values(source(), BLOCKS, 1, "v").float().numpy()
    assert np.array_equal(memory[1, 1][blocks].reshape(TOKENS, 4, 32), want)
