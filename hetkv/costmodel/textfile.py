"""Text files of users: UTF-8, or one error that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hetkv.errors import InputError


def read_utf8(path: str | Path) -> str:
    """The text of a file, without a byte order mark. Raises `InputError` where it is no UTF-8, `OSError` as `open`."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason})") from None


_RESOLVERS = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader = type("_Loader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": _RESOLVERS})


def load_yaml(text: str) -> Any:
    """The document, in which a date is text whether it is quoted or not. Raises `yaml.YAMLError`."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
