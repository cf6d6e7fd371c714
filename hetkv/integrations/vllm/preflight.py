"""Checks that need no model, before one is loaded: what is served, the settings, the secret, certificates, the address.

vLLM makes a connector only when its workers have loaded the model, minutes after the start, and shows its class the
configuration earlier on GPUs alone. The command line has it from the beginning, so it is read from there.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from hetkv.control.tls import Tls
from hetkv.errors import InputError
from hetkv.integrations.vllm.limits import check_arguments
from hetkv.integrations.vllm.settings import Settings

OPTION = "--kv-transfer-config"
CONNECTOR, MULTI = "HetKVConnector", "MultiConnector"
NOT_IN_MULTI = f"{CONNECTOR} inside {MULTI} has not been shown to work: two connectors would hold one cache's blocks"


def check_command_line(arguments: Sequence[str]) -> None:
    """Check what a server's command line says of this connector. Raises `InputError`.

    What is not there, or not as vLLM would take it, is left to vLLM.
    """
    for config in _configs(arguments):
        check_arguments(arguments)
        extra = config.get("kv_connector_extra_config") or {}
        if not isinstance(extra, dict):
            continue
        settings = Settings.parse(extra)
        settings.secret()
        if settings.tls is not None:
            Tls(settings.tls)
        if config.get("kv_role") in ("kv_producer", "kv_both"):
            check_address(settings)


def check_address(settings: Settings) -> None:
    """Raise `InputError` where rank 0 of a producer cannot listen: the port is taken, or the host is not this one."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        socket.create_server((settings.host, settings.port), family=family).close()
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"kv_connector_extra_config: cannot listen on {settings.address(0)}: {why}") from None


def _configs(arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """This connector's configurations on a command line. Raises `InputError` for one inside a MultiConnector."""
    for at, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name.replace("_", "-") != OPTION:
            continue
        text = value if "=" in argument else "".join(arguments[at + 1 : at + 2])
        try:
            config = json.loads(text)
        except ValueError:
            continue
        if not isinstance(config, dict):
            continue
        if config.get("kv_connector") == CONNECTOR:
            yield config
        elif config.get("kv_connector") == MULTI and f'"{CONNECTOR}"' in text:
            raise InputError(NOT_IN_MULTI)
