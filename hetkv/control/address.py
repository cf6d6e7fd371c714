"""Where a listener is: `Address`."""

from __future__ import annotations

from typing import NamedTuple

from hetkv.errors import InputError


class Address(NamedTuple):
    """A host name or address literal, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """`host:port`, `[ipv6]:port`, or `:port` for all interfaces of a listener. Raises `InputError`."""
        host, colon, port = text.rpartition(":")
        if not colon:
            raise InputError(f"address {text!r} has no port; write host:port")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise InputError(f"address {text!r}: write an IPv6 address in brackets, [host]:port")
        if not (port.isascii() and port.isdigit() and int(port) <= 65535):
            raise InputError(f"address {text!r}: port {port!r} is not a number from 0 to 65535")
        return cls(host, int(port))
