"""Element types that KV memory and the wire may hold. Names are PyTorch's; codes are the wire's and never reused."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from hetkv.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch


class DType(enum.Enum):
    """An element type. `value` is its name in PyTorch, `code` its number on the wire and in C++ (`csrc/map.h`)."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT8_E4M3FN = "float8_e4m3fn"
    FLOAT8_E4M3FNUZ = "float8_e4m3fnuz"
    FLOAT8_E5M2 = "float8_e5m2"
    FLOAT8_E5M2FNUZ = "float8_e5m2fnuz"
    INT8 = "int8"
    UINT8 = "uint8"
    """Opaque bytes (`state` layers): moved, never converted."""

    @property
    def code(self) -> int:
        """Number of this dtype on the wire and in C++."""
        return _CODES[self]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _SIZES[self]

    @property
    def torch(self) -> torch.dtype:
        """The PyTorch dtype of the same name."""
        import torch

        dtype: torch.dtype = getattr(torch, self.value)
        return dtype

    @property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy dtype of the same name; `uint16` or `uint8` where it needs `ml_dtypes`, which is missing."""
        import numpy as np

        if self.value in ("float32", "float16", "int8", "uint8"):
            return np.dtype(self.value)
        try:
            import ml_dtypes
        except ImportError:
            return np.dtype(f"<u{self.itemsize}")
        dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, self.value))
        return dtype

    @classmethod
    def parse(cls, name: object) -> DType:
        """The dtype of a name (`"bfloat16"`, short forms such as `"bf16"` and `"fp8"`), or of PyTorch's or NumPy's."""
        if isinstance(name, cls):
            return name
        text = getattr(name, "name", None) or getattr(name, "__name__", None) or str(name)
        text = str(text).removeprefix("torch.")
        try:
            return cls(_ALIASES.get(text, text))
        except ValueError:
            known = ", ".join(dtype.value for dtype in cls)
            raise InputError(f"dtype {text!r} is not known; known are {known}") from None


_CODES = {dtype: code for code, dtype in enumerate(DType, start=1)}
_SIZES = {dtype: {"float32": 4, "float16": 2, "bfloat16": 2}.get(dtype.value, 1) for dtype in DType}
_ALIASES = {
    "fp32": "float32",
    "float": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e4m3fn": "float8_e4m3fn",
    "fp8_e4m3fnuz": "float8_e4m3fnuz",
    "fp8_e5m2": "float8_e5m2",
    "fp8_e5m2fnuz": "float8_e5m2fnuz",
}
