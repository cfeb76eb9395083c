"""What doctor finds about networks."""

import errno
import os
from pathlib import Path

import pytest
from network_world import needs_root

from fcvm.linux import namespaces, tap
from fcvm.network import diagnose

pytestmark = needs_root


@pytest.mark.parametrize("mode", ["bridged", "rootless", "none"])
def test_this_host_has_what_is_needed(mode: str) -> None:
    links = os.listdir("/sys/class/net")
    assert diagnose.problems(mode) == []
    assert os.listdir("/sys/class/net") == links


def test_every_problem_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnose.process, "environment", lambda extra=None: {"PATH": "/nonexistent"})
    monkeypatch.setattr(tap, "TUN", "/dev/net/nonexistent")
    found = diagnose.problems("rootless")
    assert ["slirp4netns is not installed" in found[0].message, "no tap devices" in found[1].message] == [True, True]
    assert all(error.hint for error in found)


def test_bridged_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    (found,) = diagnose.problems("bridged")
    assert "needs root" in found.message


def test_a_host_that_refuses_user_namespaces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(kind: int) -> None:
        raise OSError(errno.EPERM, "refused")

    monkeypatch.setattr(namespaces, "unshare", refuse)
    (found,) = diagnose.problems("rootless")
    assert "user namespace" in found.message
    assert found.hint
