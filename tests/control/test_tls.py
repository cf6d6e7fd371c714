"""TLS with certificates of both sides: who is let in, what both sides say of who is not, and what keys depend on."""

from __future__ import annotations

import errno
import hashlib
import os
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hetkv.control import handshake
from hetkv.control.description import Ready
from hetkv.control.handshake import Schedule
from hetkv.control.tls import Tls, TlsConfig, is_allowed
from hetkv.errors import AuthenticationError, CertificateError, InputError, VersionError
from tests.control.authority import Authority
from tests.control.peers import HELLO_BYTES, SECRET, Proxy, join, loss_of, raw_client, serving

HERE = "127.0.0.1"
PREFILL, DECODE = "spiffe://cluster/prefill/0", "spiffe://cluster/decode/0"


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


def rejections(server_side: TlsConfig, client_side: TlsConfig | None) -> tuple[Exception, Exception]:
    """What the listening and the connecting side say where they do not come together."""
    with serving(tls=Tls(server_side)) as server:
        with pytest.raises(AuthenticationError) as found:
            join(server, tls=Tls(client_side) if client_side is not None else None)
        theirs = server.error()
        assert server.connections.empty()
        assert server.rejected.empty()  # there was one attempt
        return theirs, found.value


def test_both_certificates_are_checked_and_nothing_is_in_clear(ca: Authority) -> None:
    listening, connecting = ca.issue("listening", HERE), ca.issue("connecting", "decode.example")
    with serving(tls=Tls(listening)) as server, Proxy(server.address) as proxy:
        with join(server, address=proxy.address, tls=Tls(connecting)) as client, server.next() as peer:
            client.send(Ready())
            assert peer.recv(5) == Ready()
            client.close("done")
            assert "done" in str(loss_of(peer))
        seen = proxy.sent["up"] + proxy.sent["down"]
        assert b"hetkvctl" not in seen
        assert b"decode.example" not in seen  # TLS 1.3 encrypts certificates, too


@pytest.mark.parametrize("name", ["another authority", "hetkv test authority"])
def test_a_strangers_certificate(ca: Authority, tmp_path: Path, name: str) -> None:
    """Of an authority that is not trusted, also where it has the name of the one that is; on either side."""
    stranger = Authority(tmp_path / "stranger", name)
    good, own = ca.issue("good", HERE), stranger.issue("own", HERE, ca=ca.file)
    theirs, mine = rejections(good, own)
    assert (theirs.reason, theirs.own) == ("unknown-ca", False)
    assert "not of an authority that this side trusts" in str(theirs)
    assert (mine.reason, mine.own) == ("unknown-ca", True)
    theirs, mine = rejections(own, good)
    assert (mine.reason, mine.own) == ("unknown-ca", False)
    assert (theirs.reason, theirs.own) == ("unknown-ca", True)


def test_an_expired_certificate(ca: Authority) -> None:
    good, expired = ca.issue("good", HERE), ca.issue("expired", HERE, begins=-3, ends=-2)
    theirs, mine = rejections(good, expired)
    assert (theirs.reason, theirs.own, mine.reason, mine.own) == ("expired", False, "expired", True)
    assert "has expired" in str(theirs)
    assert "this side's certificate" in str(mine)
    theirs, mine = rejections(expired, good)
    assert (theirs.reason, theirs.own, mine.reason, mine.own) == ("expired", True, "expired", False)


def test_one_that_is_not_valid_yet(ca: Authority) -> None:
    theirs, mine = rejections(ca.issue("good", HERE), ca.issue("early", HERE, begins=2, ends=3))
    assert (theirs.reason, mine.own) == ("not-yet-valid", True)


def test_a_revoked_certificate(ca: Authority) -> None:
    revoked = ca.issue("revoked", HERE)
    ca.revoke(revoked)
    good = ca.issue("good", HERE, crl=ca.crl())
    theirs, mine = rejections(good, revoked)
    assert (theirs.reason, theirs.own, mine.reason, mine.own) == ("revoked", False, "revoked", True)
    assert "was revoked" in str(theirs)
    theirs, mine = rejections(revoked, good)
    assert (theirs.reason, theirs.own, mine.reason, mine.own) == ("revoked", True, "revoked", False)


def test_a_list_of_revoked_ones_that_is_too_old_or_of_another_authority(ca: Authority, tmp_path: Path) -> None:
    other = ca.issue("other", HERE)
    theirs, _ = rejections(ca.issue("good", HERE, crl=ca.crl(ends=-1)), other)
    assert theirs.reason == "crl"
    assert "too old" in str(theirs)
    elsewhere = Authority(tmp_path / "elsewhere", "another authority")
    theirs, _ = rejections(ca.issue("good", HERE, crl=elsewhere.crl()), other)
    assert theirs.reason == "crl"
    assert "there is no list" in str(theirs)


@pytest.mark.parametrize("rejecting", ["listening", "connecting"])
def test_a_name_that_is_not_on_the_list(ca: Authority, rejecting: str) -> None:
    """Both sides say so, and the one that rejects says which name it was."""
    lists = {"listening": (DECODE,), "connecting": (PREFILL,)} | {rejecting: ("spiffe://cluster/other/*",)}
    theirs, mine = rejections(
        ca.issue("prefill", PREFILL, peers=lists["listening"]), ca.issue("decode", DECODE, peers=lists["connecting"])
    )
    rejects, rejected = (theirs, mine) if rejecting == "listening" else (mine, theirs)
    assert (rejects.reason, rejects.own, rejected.reason, rejected.own) == ("identity", False, "identity", True)
    assert (DECODE if rejecting == "listening" else PREFILL) in str(rejects)


def test_names_on_the_list_are_let_in(ca: Authority) -> None:
    """The host of the address does not matter then."""
    listening = ca.issue("prefill", PREFILL, "prefill.example", peers=("spiffe://cluster/decode/*",))
    connecting = ca.issue("decode", DECODE, peers=("PREFILL.example",))
    with serving(tls=Tls(listening)) as server, join(server, tls=Tls(connecting)) as client, server.next() as peer:
        client.send(Ready())
        assert peer.recv(5) == Ready()


def test_without_a_list_the_host_of_the_address_is_checked(ca: Authority) -> None:
    theirs, mine = rejections(ca.issue("elsewhere", "elsewhere.example"), ca.issue("decode", DECODE))
    assert (mine.reason, mine.own, theirs.own) == ("host", False, True)


def test_a_side_without_a_certificate_or_without_tls(ca: Authority) -> None:
    good = ca.issue("good", HERE)
    theirs, mine = rejections(good, None)
    assert "does not speak it" in str(theirs)
    assert (mine.reason, mine.own) == ("missing", True)
    with serving() as server, pytest.raises(AuthenticationError, match="does not speak it"):
        join(server, tls=Tls(good))
    with serving(tls=Tls(good)) as server:
        context = ssl.create_default_context(cafile=good.ca)
        context.check_hostname = False
        with context.wrap_socket(raw_client(server.address)) as sock:
            with pytest.raises(ssl.SSLError, match=r"(?i)certificate[_ ]required"):
                sock.recv(100)
        assert server.error().reason == "missing"


def test_tls_1_2_is_rejected(ca: Authority) -> None:
    good = ca.issue("good", HERE)
    with serving(tls=Tls(good)) as server:
        context = ssl.create_default_context(cafile=good.ca)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with raw_client(server.address) as sock, pytest.raises(ssl.SSLError):
            context.wrap_socket(sock, server_hostname=HERE)
        assert "TLS failed" in str(server.error())


def test_no_session_is_resumed(ca: Authority) -> None:
    """A resumed session would not look at the certificate again."""
    good = ca.issue("good", HERE)
    with serving(tls=Tls(good)) as server:
        context = Tls(good).credentials().client
        with context.wrap_socket(raw_client(server.address), server_hostname=HERE) as sock:
            assert sock.recv(HELLO_BYTES)[:8] == handshake.MAGIC  # tickets would come before it
            assert sock.session is None or not sock.session.has_ticket


def test_a_peer_of_an_older_minor_version_is_rejected(ca: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    good = ca.issue("good", HERE)
    with serving(tls=Tls(good)) as server:
        monkeypatch.setattr(handshake, "MINOR", handshake.TLS_SINCE - 1)
        with pytest.raises(VersionError, match=r"with TLS both sides need control protocol 2\.5"):
            join(server, tls=Tls(good))


def test_keys_depend_on_both_certificates_and_on_hellos_that_were_never_in_clear(
    ca: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The secret alone, and all that crossed the network, do not give a stream's key: there is forward secrecy."""
    made: list[tuple[Schedule, tuple[bytes, ...]]] = []

    class Watched(Schedule):
        def __init__(self, *inputs: bytes) -> None:
            super().__init__(*inputs)
            made.append((self, inputs))

    monkeypatch.setattr(handshake, "Schedule", Watched)
    listening, connecting = ca.issue("listening", HERE), ca.issue("connecting", HERE)
    with serving(tls=Tls(listening)) as server, Proxy(server.address) as proxy:
        with join(server, address=proxy.address, tls=Tls(connecting)), server.next():
            seen = bytes(proxy.sent["up"] + proxy.sent["down"])
    (mine, inputs), (theirs, _) = made
    secret, *hellos, certificates = inputs
    assert secret == SECRET
    assert mine.key("stream 0 sender", 16) == theirs.key("stream 0 sender", 16)
    digests = [hashlib.sha256(_der(side)).digest() for side in (connecting, listening)]  # the sender connects
    assert certificates == b"".join(digests)
    for hello in hellos:
        assert hello[24:56] not in seen  # the nonce
    assert Schedule(secret, *hellos).key("link", 8) != mine.key("link", 8)
    other = Schedule(secret, *hellos, digests[1] + digests[0])
    assert other.key("link", 8) != mine.key("link", 8)


def test_many_peers_at_once_take_turns(ca: Authority) -> None:
    """The listener ends handshakes that are too many, also inside TLS; those peers try again."""
    listening, connecting = Tls(ca.issue("listening", HERE)), Tls(ca.issue("connecting", HERE))
    with serving(tls=listening, max_handshakes=2) as server:
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda _: join(server, tls=connecting), range(24)))
        for connection in made:
            server.next().close()
            connection.close()
        ended = []
        while not server.rejected.empty():
            ended.append(server.error())
        assert not any(isinstance(error, CertificateError) for error in ended)


# --- files


def test_certificates_are_read_again_for_new_connections(ca: Authority) -> None:
    """What expires is replaced, and what is revoked later is rejected, without a restart; standing links stay."""
    expired = ca.issue("rotating", HERE, begins=-3, ends=-2)
    connecting = ca.issue("connecting", HERE, crl=ca.crl())
    with serving(tls=Tls(expired)) as server:
        mine = Tls(connecting)
        with pytest.raises(CertificateError):
            join(server, tls=mine)
        server.error()
        renewed = ca.issue("rotating", HERE)
        assert renewed.certificate == expired.certificate
        with join(server, tls=mine) as client, server.next() as peer:
            ca.revoke(renewed)
            ca.crl()
            with pytest.raises(CertificateError) as found:
                join(server, tls=mine)
            assert found.value.reason == "revoked"
            client.send(Ready())
            assert peer.recv(5) == Ready()


def test_files_that_go_wrong_leave_what_was_read(ca: Authority, caplog: pytest.LogCaptureFixture) -> None:
    side = ca.issue("side", HERE)
    tls = Tls(side)
    before = tls.credentials()
    Path(side.certificate).write_text("not a certificate")
    assert tls.credentials() is before
    assert "what was read before stays in use" in caplog.text
    Path(side.certificate).unlink()
    assert tls.credentials() is before
    again = ca.issue("side", HERE)
    assert tls.credentials().fingerprint == hashlib.sha256(_der(again)).digest()


def test_files_that_could_not_be_read_are_read_later(ca: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor may have been left just when they were replaced."""
    side = ca.issue("side", HERE)
    tls = Tls(side)
    before = tls.credentials()
    again = ca.issue("side", HERE)

    def no_descriptor(path: Path, *_: object) -> str:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", no_descriptor)
        assert tls.credentials() is before
    assert tls.credentials().fingerprint == hashlib.sha256(_der(again)).digest()


def test_wrong_files_and_names_are_rejected_by_name(ca: Authority, tmp_path: Path) -> None:
    side = ca.issue("side", HERE)
    with pytest.raises(InputError, match=r"nowhere\.pem: No such file"):
        Tls(TlsConfig(ca=str(tmp_path / "nowhere.pem"), certificate=side.certificate, key=side.key))
    with pytest.raises(InputError, match=r"side\.key"):  # holds no certificate
        Tls(TlsConfig(ca=str(side.key), certificate=side.certificate, key=side.key))
    other = ca.issue("other", HERE)
    with pytest.raises(InputError, match=r"other\.key: KEY_VALUES_MISMATCH"):
        Tls(TlsConfig(ca=side.ca, certificate=side.certificate, key=other.key))
    Path(other.key).chmod(0o640)
    with pytest.raises(InputError, match="can be used by others: chmod 600 it"):
        Tls(other)
    for peers in (("",), ("*.example",), ("spiffe://a/*/b",), "spiffe://a", (1,)):
        with pytest.raises(InputError, match=r"tls\.peers"):
            TlsConfig(ca="ca", certificate="cert", peers=peers)
    for ca_file in ("", None, 3):
        with pytest.raises(InputError, match=r"tls\.ca"):
            TlsConfig(ca=ca_file, certificate="cert")


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        (DECODE, True), ("decode.example", True), ("DECODE.example", True), ("spiffe://other/x/y", True),
        ("spiffe://other/", False), ("spiffe://other", False), ("spiffe://cluster/decode/00", False),
        ("spiffe://CLUSTER/decode/0", False), ("a.decode.example", False), ("", False),
    ],
)  # fmt: skip
def test_what_is_on_a_list(name: str, allowed: bool) -> None:
    assert is_allowed(name, (DECODE, "decode.example", "spiffe://other/*")) == allowed


def _der(side: TlsConfig) -> bytes:
    return ssl.PEM_cert_to_DER_cert(Path(side.certificate).read_text())
