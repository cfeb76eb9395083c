"""Subnets, and what is said when a host refuses namespaces."""

import errno
import socket
import threading
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcvm.linux import namespaces, netlink, nft
from fcvm.linux.namespaces import Namespace
from fcvm.network import neighbours
from fcvm.network.loop import Loop
from fcvm.network.subnets import POOLS, SIZE, Subnet

numbers = st.integers(0, SIZE * len(POOLS) - 1)


@given(numbers)
def test_a_subnet_lies_in_its_pool(number: int) -> None:
    subnet = Subnet(number)
    assert subnet.host.network == subnet.inner.network
    assert subnet.host.ip in list(subnet.host.network.hosts())
    assert subnet.inner.ip in list(subnet.host.network.hosts())
    assert subnet.host.ip != subnet.inner.ip
    assert any(subnet.host.network.subnet_of(pool) for pool in POOLS)
    assert len(subnet.interface) < 16  # IFNAMSIZ


@given(numbers, numbers)
def test_subnets_do_not_overlap(one: int, other: int) -> None:
    overlap = Subnet(one).host.network.overlaps(Subnet(other).host.network)
    overlap6 = Subnet(one).host6.network.overlaps(Subnet(other).host6.network)
    assert overlap == overlap6 == (one == other)


@pytest.mark.parametrize(
    ("sysctls", "number", "says", "hint"),
    [
        ({"kernel/apparmor_restrict_unprivileged_userns": "1"}, errno.EPERM, "AppArmor",
         "kernel.apparmor_restrict_unprivileged_userns=0"),
        ({"kernel/unprivileged_userns_clone": "0"}, errno.EPERM, "ordinary users", "unprivileged_userns_clone=1"),
        ({"user/max_user_namespaces": "0"}, errno.ENOSPC, "max_user_namespaces is 0", "max_user_namespaces=10000"),
        ({"user/max_net_namespaces": "0"}, errno.ENOSPC, "max_net_namespaces is 0", "max_net_namespaces=10000"),
        ({"user/max_net_namespaces": "9"}, errno.ENOSPC, "no room", "sysctl user.max_user_namespaces"),
        ({}, errno.EPERM, "A container or a security policy", "as root"),
    ],
)  # fmt: skip
def test_why_a_user_namespace_is_refused(
    tmp_path: Path, sysctls: dict[str, str], number: int, says: str, hint: str
) -> None:
    for name, value in sysctls.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(value + "\n")
    error = namespaces.refusal(number, user=True, sysctl=tmp_path)
    assert says in error.message
    assert error.hint
    assert hint in error.hint


def test_work_in_a_thread_returns_or_raises() -> None:
    assert namespaces.in_thread(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        namespaces.in_thread(lambda: 1 // 0)


@given(st.lists(st.tuples(st.integers(1, 99), st.binary(max_size=9)), max_size=5))
def test_attributes_are_read_as_written(pairs: list[tuple[int, bytes]]) -> None:
    data = b"".join(netlink.attribute(kind, value) for kind, value in pairs)
    assert len(data) % 4 == 0
    assert list(netlink.each_attribute(data)) == pairs


def test_a_truncated_attribute_ends_the_list() -> None:
    assert list(netlink.each_attribute(b"\0\0\1\0")) == []
    assert list(netlink.each_attribute(b"\x08")) == []


def test_a_prefix_is_compared_as_a_prefix() -> None:
    assert b"fcvm\0" not in nft.iifname("fcvm*")
    assert b"fcvm\0" in nft.iifname("fcvm")


def test_what_could_not_be_refused_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bridged VM starts while this host has no memory for a process that adds the rule."""
    changes, tell = socket.socketpair()

    class Changes:
        def __enter__(self) -> "Changes":
            return self

        def __exit__(self, *_: object) -> None: ...

        def subscribe(self, _: int) -> socket.socket:
            return changes

    refused: list[object] = []
    known: set[IPv4Network] = set()
    failures = 1
    done = threading.Event()

    def inside(_: object, function: Callable[[], list[int]]) -> list[int]:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        return function()

    def refuse(networks: set[IPv4Network]) -> list[int]:
        refused.extend(networks)
        done.set()
        return []

    monkeypatch.setattr(neighbours.rtnetlink, "open_socket", Changes)
    monkeypatch.setattr(neighbours, "_bridged", lambda _: set(known))
    monkeypatch.setattr(neighbours, "_RETRY", 0.05, raising=False)
    monkeypatch.setattr(neighbours.namespaces, "inside", inside)
    monkeypatch.setattr(neighbours.inner, "refuse", refuse)
    loop = Loop()
    loop.start()
    neighbours.keep_away(loop, Namespace(-1))
    known.add(IPv4Network("172.30.0.0/30"))
    tell.send(b"an address")
    assert done.wait(20)
    assert refused == [IPv4Network("172.30.0.0/30")]
    loop.close()
    tell.close()
