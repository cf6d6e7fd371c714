"""Options that make a `TlsConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hetkv.errors import InputError

if TYPE_CHECKING:
    import argparse

    from hetkv.control.tls import TlsConfig

FILES = {
    "certificate": "of this side",
    "key": "its private key, mode 600 (default: in --tls-certificate)",
    "crl": "revoked certificates",
}
PEER = "a name that others may have, such as spiffe://cluster/llm/* (repeat; default: all of the authorities')"


def add_arguments(parser: Any, what: str, certificate: str = FILES["certificate"]) -> None:
    """`--tls-ca` and the others, on a parser or a group of one. `what` is what goes over TLS."""
    parser.add_argument("--tls-ca", metavar="FILE", help=f"TLS {what}: the authorities' certificates")
    for name, text in {**FILES, "certificate": certificate}.items():
        parser.add_argument(f"--tls-{name}", metavar="FILE", help=text)
    parser.add_argument("--tls-peer", action="append", default=[], metavar="NAME", help=PEER)


def tls_config(args: argparse.Namespace) -> TlsConfig | None:
    """What the options say. Raises `InputError` where they are not whole."""
    from hetkv.control.tls import TlsConfig

    if args.tls_ca and args.tls_certificate:
        return TlsConfig(
            ca=args.tls_ca,
            certificate=args.tls_certificate,
            key=args.tls_key,
            crl=args.tls_crl,
            peers=tuple(args.tls_peer),
        )
    if args.tls_ca or args.tls_certificate or args.tls_key or args.tls_crl or args.tls_peer:
        raise InputError("TLS needs --tls-ca and --tls-certificate")
    return None
