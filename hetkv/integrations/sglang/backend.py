"""The backend `hetkv` among SGLang's own, whose list is an enumeration: `register`."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.specifiers import SpecifierSet

from hetkv.errors import BuildError

NAME, SUPPORTED = "hetkv", ">=0.5.23,<0.5.24"


def register() -> None:
    """Add it. A second call does nothing. Raises `BuildError` for a version of SGLang that is not `SUPPORTED`."""
    try:
        found = version("sglang")
    except PackageNotFoundError:
        raise BuildError(f"hetkv's transfer backend needs SGLang {SUPPORTED}") from None
    if not SpecifierSet(SUPPORTED).contains(found, prereleases=True):
        raise BuildError(f"hetkv's transfer backend supports SGLang {SUPPORTED}, this is SGLang {found}")
    from sglang.srt.arg_groups.choices import DISAGG_TRANSFER_BACKEND_CHOICES
    from sglang.srt.disaggregation import utils

    if NAME in DISAGG_TRANSFER_BACKEND_CHOICES:
        return
    _add_member(utils.TransferBackend)
    _add_classes(utils)
    DISAGG_TRANSFER_BACKEND_CHOICES.append(NAME)


def _add_member(kind: Any) -> None:
    """One more member of an enumeration."""
    member = object.__new__(kind)
    member._name_, member._value_ = NAME.upper(), NAME
    kind._member_names_.append(NAME.upper())
    kind._member_map_[NAME.upper()] = kind._value2member_map_[NAME] = member
    type.__setattr__(kind, NAME.upper(), member)


def _add_classes(utils: Any) -> None:
    """`get_kv_class` of every module that has it knows this backend's classes, too."""
    original = utils.get_kv_class

    def get_kv_class(transfer_backend: Any, class_type: Any) -> Any:
        if transfer_backend.value != NAME or class_type == utils.KVClassType.KVARGS:
            return original(transfer_backend, class_type)
        from hetkv.integrations.sglang import transfer

        return {
            utils.KVClassType.MANAGER: transfer.HetkvKVManager,
            utils.KVClassType.SENDER: transfer.HetkvKVSender,
            utils.KVClassType.RECEIVER: transfer.HetkvKVReceiver,
            utils.KVClassType.BOOTSTRAP_SERVER: transfer.HetkvKVBootstrapServer,
        }[class_type]

    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("get_kv_class") is original:  # a module's own getattr may import
            module.get_kv_class = get_kv_class  # type: ignore[attr-defined]
