"""Who may link: certificates and secrets of nodes, and their replacement while nodes run."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from hetkv import Exchange, KVPool, KVSpec, Receiver, SecretFile, Sender, TlsConfig
from hetkv.control import establish
from hetkv.errors import CertificateError, InputError, SecretError
from tests.control.authority import Authority
from tests.transport.peers import SECRET, check_transfer, connected, randomise

SPEC = KVSpec.uniform(2, 2, 64)
PREFILL, DECODE = "spiffe://cluster/prefill/0", "spiffe://cluster/decode/0"


def pools() -> tuple[KVPool, KVPool]:
    return randomise(KVPool.allocate(SPEC, 16), 1), randomise(KVPool.allocate(SPEC, 16), 2)


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.mark.parametrize("sockets", ["none", None])
def test_kv_moves_where_both_have_certificates(
    ca: Authority, monkeypatch: pytest.MonkeyPatch, sockets: str | None
) -> None:
    if sockets is not None:
        monkeypatch.setenv("HETKV_SOCKET_DIR", sockets)
    source, destination = pools()
    with connected([source], [destination], tls=ca.issue("both", "127.0.0.1")) as ([sender], [receiver]):
        check_transfer(source, destination, sender, receiver, 100)
        assert sender.peers[0].kind == ("tcp" if sockets else "unix")


def test_each_certificate_is_rejected_by_name(ca: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's, an expired one, a revoked one, and one of a name that is not allowed: the receiver that connects
    says why at its first attempt, and no link is left on either side."""
    reached = []
    reach = establish._reach
    monkeypatch.setattr(establish, "_reach", lambda *target: reached.append(target) or reach(*target))
    stranger, revoked = Authority(tmp_path / "stranger"), ca.issue("revoked", DECODE)
    ca.revoke(revoked)
    prefill = ca.issue("prefill", PREFILL, crl=ca.crl(), peers=("spiffe://cluster/decode/*",))
    peers = (PREFILL,)
    wrong = {
        "unknown-ca": stranger.issue("stranger", DECODE, ca=ca.file, peers=peers),
        "expired": ca.issue("expired", DECODE, begins=-3, ends=-2, peers=peers),
        "revoked": msgspec.structs.replace(revoked, peers=peers),
        "identity": ca.issue("other", "spiffe://cluster/other/0", peers=peers),
    }
    source, destination = pools()
    with Sender(source, secret=SECRET, instance="p", tls=prefill) as sender:
        address = sender.listen()
        for reason, side in wrong.items():
            with Receiver(destination, secret=SECRET, instance="d", tls=side) as receiver:
                reached.clear()
                with pytest.raises(CertificateError) as found:
                    receiver.connect(address)
                assert (found.value.reason, found.value.own) == (reason, True)
                assert len(reached) == 1  # no attempt follows
                assert not receiver.peers
        assert not sender.peers
        right = ca.issue("right", DECODE, peers=peers)
        with Receiver(destination, secret=SECRET, instance="d", tls=right) as receiver:
            receiver.connect(address)
            check_transfer(source, destination, sender, receiver, 50)


def test_a_certificate_does_not_replace_the_secret(ca: Authority) -> None:
    side, (source, destination) = ca.issue("both", "127.0.0.1"), pools()
    with Sender(source, secret=SECRET, instance="p", tls=side) as sender:
        with Receiver(destination, secret=b"another secret of tests", instance="d", tls=side) as receiver:
            with pytest.raises(SecretError):
                receiver.connect(sender.listen())
        with Receiver(destination, secret=SECRET, instance="d") as receiver:
            with pytest.raises(CertificateError, match="the peer asks for it"):
                receiver.connect(sender.listen())


def test_secrets_of_nodes_are_replaced(tmp_path: Path) -> None:
    """One node by its file, one by a call; a request that is under way does not notice."""
    file, new = tmp_path / "secret", b"the secret from now on"
    file.touch(0o600)
    file.write_bytes(SECRET)
    source, destination = pools()
    with Sender(source, secret=SecretFile(file), instance="p") as sender:
        address = sender.listen()
        with Receiver(destination, secret=SECRET, instance="d") as receiver:
            receiver.connect(address)
            receiver.rotate_secret(new, accept_old_s=60)
            check_transfer(source, destination, sender, receiver, 50)
            receiver.disconnect(receiver.peers[0])
        with Receiver(destination, secret=SECRET, instance="d2") as receiver:
            receiver.rotate_secret(new, accept_old_s=60)
            receiver.connect(address)  # the sender has the old one alone
            tmp_path.joinpath("secret.old").touch(0o600)
            tmp_path.joinpath("secret.old").write_bytes(SECRET)
            file.write_bytes(new)
            check_transfer(source, destination, sender, receiver, 50, request="2")
        for secret in (SECRET, new):
            with Receiver(destination, secret=secret, instance=f"d{len(secret)}") as receiver:
                receiver.connect(address)
        tmp_path.joinpath("secret.old").unlink()
        with Receiver(destination, secret=SECRET, instance="late") as receiver, pytest.raises(SecretError):
            receiver.connect(address)
        with pytest.raises(InputError, match="write the new one there"):
            sender.rotate_secret(new)
    with Sender(source, secret=SECRET, instance="p") as sender:
        for seconds in (-1, float("nan"), 1e9):
            with pytest.raises(InputError, match="accept_old_s"):
                sender.rotate_secret(new, seconds)
        with pytest.raises(InputError, match="16 or more"):
            sender.rotate_secret(b"short")


def test_wrong_settings_are_rejected_by_name(tmp_path: Path) -> None:
    pool = pools()[0]
    with pytest.raises(InputError, match="tls is a TlsConfig, not dict"):
        Sender(pool, secret=SECRET, instance="p", tls={"ca": "x"})
    with pytest.raises(InputError, match=r"nowhere\.pem: No such file"):
        Exchange(pool, secret=SECRET, instance="p", tls=TlsConfig(ca=str(tmp_path / "nowhere.pem"), certificate="x"))
