"""``--network none``: the guest keeps its interface, so a snapshot fits every mode, but nothing is behind the tap."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fc_agent.structs import Struct
from fcvm.linux import namespaces, rtnetlink, tap
from fcvm.linux.namespaces import Namespace
from fcvm.network import guest
from fcvm.network.loop import Loop
from fcvm.network.ports import Reservation
from fcvm.network.publish import Publish


class Isolated(Struct):
    """A namespace with a tap and no way out."""

    namespace: Namespace
    sockets: tuple[socket.socket, ...] = ()
    mtu: int = 1500
    ipv6: bool = False
    changed: tuple[str, ...] = ()
    host_ip: str | None = None
    interface: str | None = None
    watch: tuple[tuple[int, str], ...] = ()

    def open(self, published: Sequence[Publish]) -> None:
        """There is nothing to publish: ``spec.parse`` refuses it."""
        assert not published

    def attend(self, loop: Loop) -> None:
        """Nothing of the host's changes what is here."""

    def serve(self, reservations: Sequence[Reservation], loop: Loop) -> None:
        """There is nothing to serve."""
        assert not reservations


@contextmanager
def isolated() -> Iterator[Isolated]:
    """A network that leads nowhere, until the block is left."""

    def furnish() -> list[int]:
        tap.create(guest.TAP)
        with rtnetlink.open_socket() as own:
            link = rtnetlink.link(own, guest.TAP)
            assert link is not None
            own.request([rtnetlink.set_link(link.index, mac=guest.GATEWAY_MAC)])
        return []

    namespace, _ = namespaces.create(furnish, user=os.geteuid() != 0)
    with namespace:
        yield Isolated(namespace)
