"""The shared secret is replaced while processes run: each takes the one before it, too, until that is taken away."""

from __future__ import annotations

import errno
import os
import pickle
import time
from pathlib import Path

import pytest

from hetkv.control.secret import HeldSecret, SecretFile
from hetkv.errors import InputError, SecretError
from tests.control.peers import join, serving

OLD, NEW, OTHER = b"the secret before", b"the secret from now on", b"a secret of nobody's"


def write(path: Path, secret: bytes) -> None:
    path.write_bytes(secret)
    path.chmod(0o600)


def replace(path: Path, secret: bytes) -> None:
    """As it is meant to be done: the one before it first, so that at no time only the new one is there."""
    before = path.with_name(path.name + ".old")
    write(before, path.read_bytes())
    new = path.with_name("new")
    write(new, secret)
    new.replace(path)


def fits(server_secret: object, client_secret: object) -> bool:
    with serving(secret=server_secret) as server:
        try:
            with join(server, secret=client_secret), server.next():
                return True
        except SecretError:
            assert isinstance(server.error(), SecretError)
            return False


def test_either_side_may_be_first() -> None:
    for first in (0, 1):
        sides = [HeldSecret(OLD), HeldSecret(OLD)]
        sides[first].rotate(NEW, 60)
        assert fits(*sides)
        sides[1 - first].rotate(NEW, 60)
        assert fits(*sides)
        assert fits(sides[0], HeldSecret(NEW))
        assert fits(HeldSecret(NEW), sides[1])
        assert not fits(sides[0], HeldSecret(OTHER))


def test_the_old_one_ends_with_its_window() -> None:
    side = HeldSecret(OLD)
    side.rotate(NEW, 0.2)
    assert side.accepted() == (NEW, OLD)
    assert fits(side, HeldSecret(OLD))
    time.sleep(0.25)
    assert side.accepted() == (NEW,)
    assert not fits(side, HeldSecret(OLD))
    assert not fits(HeldSecret(OLD), side)


def test_a_second_replacement_does_not_extend_the_first_ones_window() -> None:
    side = HeldSecret(OLD)
    side.rotate(NEW, 0.1)
    side.rotate(OTHER, 60)
    assert side.accepted() == (OTHER, NEW, OLD)
    time.sleep(0.12)
    assert side.accepted() == (OTHER, NEW)
    side.rotate(NEW, 60)  # back again
    assert side.accepted() == (NEW, OTHER)
    with pytest.raises(InputError, match="16 or more"):
        side.rotate(b"short", 60)


def test_links_that_stand_stay() -> None:
    side = HeldSecret(OLD)
    with serving(secret=side) as server, join(server, secret=OLD) as client, server.next() as peer:
        side.rotate(NEW, 0)
        with pytest.raises(SecretError):
            join(server, secret=OLD)
        assert (client.lost, peer.lost) == (None, None)


def test_a_file_is_read_again(tmp_path: Path) -> None:
    files = [tmp_path / name / "secret" for name in ("a", "b")]
    for path in files:
        path.parent.mkdir()
        write(path, OLD)
    sides = [SecretFile(path) for path in files]
    assert fits(*sides)
    replace(files[0], NEW)
    assert sides[0].accepted() == (NEW, OLD)
    assert fits(*sides)
    assert fits(*reversed(sides))
    replace(files[1], NEW)
    assert fits(*sides)
    for path in files:
        path.with_name("secret.old").unlink()
    assert fits(*sides)
    assert not fits(sides[0], HeldSecret(OLD))


def test_a_file_that_goes_wrong_leaves_what_was_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "secret"
    write(path, OLD)
    side = SecretFile(path)
    path.write_bytes(b"short")
    assert side.accepted() == (OLD,)
    assert "what was read before stays in use" in caplog.text
    path.unlink()
    assert side.accepted() == (OLD,)
    write(path, NEW)
    path.chmod(0o644)
    assert side.accepted() == (OLD,)
    path.chmod(0o600)
    assert side.accepted() == (NEW,)
    assert pickle.loads(pickle.dumps(side)).accepted() == (NEW,)
    with pytest.raises(InputError, match="nowhere: No such file"):
        SecretFile(tmp_path / "nowhere")


def test_a_file_that_could_not_be_read_is_read_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor may have been left just when it was replaced."""
    path = tmp_path / "secret"
    write(path, OLD)
    side = SecretFile(path)
    write(path, NEW)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", _no_descriptor)
        assert side.accepted() == (OLD,)
    assert side.accepted() == (NEW,)


def test_a_name_that_leaves_no_room_for_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / ("s" * 255)
    write(path, OLD)
    assert SecretFile(path).accepted() == (OLD,)


def _no_descriptor(path: Path) -> bytes:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
