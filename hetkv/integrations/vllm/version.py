"""Which vLLM this connector works with. Its connector interface is experimental and changes with each minor."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from hetkv.engines import VLLM_CONNECTOR
from hetkv.errors import BuildError

SUPPORTED = VLLM_CONNECTOR.versions


def check_version(version: str | None = None) -> None:
    """Raise `BuildError` unless `version` (default: of the vLLM that is installed) is in `SUPPORTED`."""
    found = version or _installed()
    try:
        fits = SpecifierSet(SUPPORTED).contains(Version(found), prereleases=True)
    except InvalidVersion:
        fits = False
    if not fits:
        raise BuildError(f"hetkv's connector supports vLLM {SUPPORTED}, this is vLLM {found}")


def _installed() -> str:
    try:
        import vllm
    except ImportError as error:
        raise BuildError(f"hetkv.integrations.vllm needs vLLM {SUPPORTED}: {error}") from None
    return str(vllm.__version__)
