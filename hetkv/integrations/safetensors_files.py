"""Tensors of a checkpoint's safetensors files, read with nothing but NumPy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hetkv.errors import InputError
from hetkv.models.fields import load_object

MAX_HEADER_BYTES = 100 << 20
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


class Stored(NamedTuple):
    """One tensor of a file."""

    name: str
    dtype: str
    """As the format says it: `BF16`, `F32`."""
    shape: tuple[int, ...]
    start: int
    stop: int
    """Bytes of the file."""


def checkpoint_files(folder: Path) -> list[Path]:
    """What `transformers` would load: the index's files, the one file, or all there are."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(set(load_object(index).get("weight_map", {}).values()))]
    single = folder / "model.safetensors"
    return [single] if single.exists() else sorted(folder.glob("*.safetensors"))


def stored_tensors(path: Path) -> list[Stored]:
    """The tensors of a file. Raises `InputError` for one that is no such file."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise InputError(f"{path}: a header of {size} bytes")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        return [
            Stored(name, entry["dtype"], tuple(entry["shape"]), *(8 + size + at for at in entry["data_offsets"]))
            for name, entry in header.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a safetensors file: {error}") from None


def float_tensors(folder: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Name and values of every tensor of a directory. Raises `InputError` for elements that are no floats."""
    for path in checkpoint_files(folder):
        for stored in stored_tensors(path):
            yield stored.name, _values(path, stored)


def _values(path: Path, stored: Stored) -> npt.NDArray[np.float32]:
    def read(kind: str) -> npt.NDArray[Any]:
        count = (stored.stop - stored.start) // np.dtype(kind).itemsize
        return np.fromfile(path, kind, count, offset=stored.start).reshape(stored.shape)

    if stored.dtype == "BF16":
        return (read("<u2").astype(np.uint32) << 16).view(np.float32)
    if stored.dtype not in FLOATS:
        raise InputError(f"{path}: tensor {stored.name!r} has elements of type {stored.dtype}")
    return np.asarray(read(FLOATS[stored.dtype]), np.float32)
