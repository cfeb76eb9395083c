"""Keeps rootless guests away from bridged ones: slirp4netns is a process of the host, which reaches every port of those.

What leads to a bridged VM is known by the addresses of the host's interfaces ``fcvm<N>``. They are looked up when a guest
starts and again whenever an address of the host changes.
"""

import socket
from contextlib import suppress
from ipaddress import IPv4Interface, IPv4Network

from fcvm import log
from fcvm.errors import FcvmError
from fcvm.linux import namespaces, netlink, rtnetlink
from fcvm.linux.namespaces import Namespace
from fcvm.network import inner
from fcvm.network.loop import READ, Loop
from fcvm.network.subnets import PREFIX

_EVENT = 1 << 16
_RETRY = 1.0  # seconds


def keep_away(loop: Loop, namespace: Namespace) -> None:
    """Let nothing of ``namespace``'s guest pass to bridged VMs, until the loop ends.

    Raises:
        OSError: the kernel refuses the rules.
    """
    changes = rtnetlink.open_socket().subscribe(rtnetlink.RTNLGRP_IPV4_IFADDR)
    known: set[IPv4Network] = set()

    def look() -> None:
        with rtnetlink.open_socket() as route:
            new = _bridged(route) - known
        if new:
            namespaces.inside(namespace, lambda: inner.refuse(new))
            known.update(new)

    def again() -> None:
        try:
            look()
        except (FcvmError, OSError) as error:  # no memory, no processes: it must not stay so
            log.warning(f"The guest is not kept away from new bridged VMs yet: {error}")
            loop.after(_RETRY, again)

    def changed(_: int) -> None:
        with suppress(OSError):  # ENOBUFS: more has changed than could be told
            changes.recv(_EVENT)
        again()

    loop.own(changes)
    look()
    loop.call(lambda: loop.watch(changes, READ, changed))


def _bridged(route: netlink.Socket) -> set[IPv4Network]:
    """The subnets of the bridged VMs."""
    found = set()
    for index, interface in rtnetlink.addresses(route):
        with suppress(OSError):  # it is gone meanwhile
            if isinstance(interface, IPv4Interface) and socket.if_indextoname(index).startswith(PREFIX):
                found.add(interface.network)
    return found
