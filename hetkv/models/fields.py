"""`Fields`: a JSON object of which every key is accounted for, read by name and type."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec

from hetkv.errors import InputError


def load_object(path: Path) -> dict[str, Any]:
    """A JSON object in a file. `InputError` names the file."""
    try:
        found = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


class Fields:
    """Values by name, with defaults for those left out. A value of a wrong type is an `InputError` that names it.

    An explicit null is a value: it overrides the default, and is rejected where the default is no null.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], origin: str) -> None:
        self.values, self.defaults, self.origin = values, defaults, origin

    def reject_unknown(self, harmless: Collection[str], what: str) -> None:
        """`InputError` for a key that is neither read, nor harmless, nor null."""
        for name, value in self.values.items():
            if value is not None and name not in self.defaults and name not in harmless:
                raise self.error(f"`{name}` is {_short(value)}, which {what} does not have; it is not ignored")

    def error(self, text: str) -> InputError:
        """An `InputError` that names the file."""
        return InputError(f"{self.origin}: {text}")

    def get(self, name: str) -> Any:
        """The value, or the default where the key is left out."""
        return self.values[name] if name in self.values else self.defaults.get(name)

    def whole(self, name: str, low: int = 1) -> int:
        """A whole number of at least `low`; 8192.0 is one."""
        value = self.get(name)
        if value is None:
            raise self.error(f"`{name}` is null" if name in self.values else f"missing field `{name}`")
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value or value in _INFINITE:
            raise self.error(f"`{name}` must be a whole number, got {_short(value)}")
        if value != int(value):
            raise self.error(f"`{name}` must be a whole number, got {_short(value)}")
        if value < low:
            raise self.error(f"`{name}` is {int(value)}, it must be at least {low}")
        if value >= 2**53:
            raise self.error(f"`{name}` is {int(value)}, which no model has")
        return int(value)

    def whole_or_none(self, name: str, low: int = 1) -> int | None:
        """As `whole`; None for null."""
        return None if self.get(name) is None else self.whole(name, low)

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.get(name)
        if value is None:
            raise self.error(f"`{name}` is null" if name in self.values else f"missing field `{name}`")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(f"`{name}` must be a number, got {_short(value)}")
        return float(value)

    def number_or_none(self, name: str) -> float | None:
        """As `number`; None for null."""
        return None if self.get(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        """True or false; null only where the default is null, and then false."""
        value = self.get(name)
        if value is None and self.defaults.get(name) is None:
            return False
        if not isinstance(value, bool):
            raise self.error(f"`{name}` must be true or false, got {_short(value)}")
        return value

    def text(self, name: str) -> str:
        """A string."""
        value = self.get(name)
        if not isinstance(value, str):
            raise self.error(f"`{name}` must be a string, got {_short(value)}")
        return value

    def items(self, name: str) -> list[Any] | None:
        """A list, or None for null."""
        value = self.get(name)
        if value is not None and not isinstance(value, list):
            raise self.error(f"`{name}` must be a list, got {_short(value)}")
        return value

    def table(self, name: str) -> dict[str, Any]:
        """An object; empty for null."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(f"`{name}` must be an object, got {_short(value)}")
        return value or {}

    def only(self, name: str, *allowed: Any) -> None:
        """`InputError` unless the value is one of those; for what a family has and hetkv does not compute."""
        value = self.get(name)
        if value not in allowed:
            raise self.error(
                f"`{name}` {_short(value)} is not supported; supported is {' or '.join(map(_short, allowed))}"
            )


_INFINITE = (math.inf, -math.inf)


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else text[:57] + "..."
