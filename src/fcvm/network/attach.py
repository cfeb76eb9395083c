"""A VM's network from its spec to its end.

with create(spec, vm_id, directory) as network:
    Firecracker(..., namespace=network.namespace)
    ...
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fcvm.linux.namespaces import Namespace
from fcvm.network import dns, guest, ports, refusals, relay, resolver
from fcvm.network.guest import Guest
from fcvm.network.loop import Loop
from fcvm.network.ports import Reservation
from fcvm.network.publish import Publish
from fcvm.network.refusals import Report
from fcvm.network.spec import NetworkSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    class Backend(Protocol):
        """A mode's part: see ``bridged``, ``rootless`` and ``isolated``."""

        @property
        def namespace(self) -> Namespace: ...
        @property
        def sockets(self) -> tuple[socket.socket, ...]: ...
        @property
        def mtu(self) -> int: ...
        @property
        def ipv6(self) -> bool: ...
        @property
        def changed(self) -> tuple[str, ...]: ...
        @property
        def host_ip(self) -> str | None: ...
        @property
        def interface(self) -> str | None: ...
        @property
        def watch(self) -> tuple[tuple[int, str], ...]: ...
        def attend(self, loop: Loop) -> None: ...
        def open(self, published: Sequence[Publish]) -> None: ...
        def serve(self, reservations: Sequence[Reservation], loop: Loop) -> None: ...


class Network:
    """A network that is up. It goes with ``close``, or with this process and those in the namespace.

    Attributes:
        tap: the name of the tap that Firecracker is to open, inside.
        mac: the guest's MAC address, the same for every VM.
        guest: what the agent is to configure.
        watch: fds that become readable when the network has died, each with what to say then.
        on_refused: called by another thread with published TCP ports at which the guest refused a connection, now and then.
        on_answered: the same with those of them at which it accepts one later.
    """

    tap = guest.TAP
    mac = guest.MAC

    def __init__(self, spec: NetworkSpec, backend: Backend, loop: Loop, published: Sequence[Publish]) -> None:
        self.spec = spec
        self.watch = backend.watch
        self.on_refused: Report = lambda ports: None
        self.on_answered: Report = lambda ports: None
        settings = resolver.read()
        self.guest: Guest = guest.guest(
            mtu=backend.mtu, search=settings.search, options=settings.options, ipv6=backend.ipv6
        )
        self._backend = backend
        self._loop = loop
        self._published = list(published)
        self._undo = ExitStack()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def namespace(self) -> Namespace:
        """The VM's namespace: where Firecracker is to run."""
        return self._backend.namespace

    def publish(self, wanted: Sequence[Publish]) -> tuple[Publish, ...]:
        """Publish ports of a VM that may be running already; returns them with the free ones decided.

        Raises:
            ConflictError, HostError, NetworkError: a port cannot be had; then none is published.
        """
        with ExitStack() as undo:
            reservations = ports.reserve(wanted)
            for reservation in reservations:
                undo.callback(reservation.close)
            published = tuple(reservation.publish for reservation in reservations)
            self._backend.open(published)
            self._backend.serve(reservations, self._loop)
            undo.pop_all()
        self._published += published
        return published

    def refused(self, ports: frozenset[int]) -> None:
        """The guest has refused connections to these ports."""
        if published := self._of_ours(ports):
            self.on_refused(published)

    def answered(self, ports: frozenset[int]) -> None:
        """The guest has accepted connections to these ports, which it had refused before."""
        if published := self._of_ours(ports):
            self.on_answered(published)

    def _of_ours(self, ports: frozenset[int]) -> frozenset[int]:
        return ports & {publish.guest_port for publish in self._published if publish.protocol == "tcp"}

    def describe(self) -> dict[str, Any]:
        """The network as ``fcvm ls --json`` shows it."""
        return {
            "mode": self.spec.mode,
            "guest_ip": str(guest.ADDRESS.ip),
            "host_ip": self._backend.host_ip,
            "interface": self._backend.interface,
            "ports": [
                {
                    "host_ip": publish.host_ip,
                    "host_port": publish.host_port,
                    "guest_port": publish.guest_port,
                    "protocol": publish.protocol,
                }
                for publish in self._published
            ],
            "forward_localhost": [str(port) for port in self.spec.forward_localhost],
            "dns": list(self.spec.dns or resolver.read().servers),
            "ipv6": self._backend.ipv6,
            "changed": list(self._backend.changed),
        }

    def close(self) -> None:
        """Take it down; a second call does nothing."""
        self._undo.close()


def create(spec: NetworkSpec, vm_id: str, directory: Path) -> Network:
    """Set a network up; the published ports are taken first, so a conflict costs nothing.

    Arguments:
        vm_id: names the host's nftables table.
        directory: where a helper's socket may lie, the VM's own.

    Raises:
        ConflictError, HostError, NetworkError: it cannot be had; nothing is left behind.
    """
    with ExitStack() as undo:
        early = ports.reserve(spec.publish)
        for reservation in early:
            undo.callback(reservation.close)
        published = [reservation.publish for reservation in early]
        backend = undo.enter_context(_backend(spec, vm_id, directory, published))
        loop = Loop()
        undo.callback(loop.close)
        network = Network(spec, backend, loop, published)
        _serve(loop, spec, backend, network)
        backend.serve(early, loop)
        backend.attend(loop)
        if spec.mode != "none":
            loop.start()
        network._undo = undo.pop_all()
        return network


@contextmanager
def _backend(spec: NetworkSpec, vm_id: str, directory: Path, published: Sequence[Publish]) -> Iterator[Backend]:
    # a mode is imported when it is used: a VM starts in milliseconds
    if spec.mode == "bridged":
        from fcvm.network.bridged import bridged

        with bridged(spec, vm_id, published) as backend:
            yield backend
    elif spec.mode == "rootless":
        from fcvm.network.rootless import rootless

        with rootless(spec, directory) as backend:
            yield backend
    else:
        from fcvm.network.isolated import isolated

        with isolated() as backend:
            yield backend


def _serve(loop: Loop, spec: NetworkSpec, backend: Backend, network: Network) -> None:
    """Answer the guest's DNS and its connections to forwarded ports, on the sockets that were opened in the namespace."""
    if not backend.sockets:
        return
    packets, udp, tcp, *forwarded = backend.sockets
    refusals.watch(loop, packets, network.refused, network.answered)
    dns.forward(loop, udp, tcp, resolver.Upstreams(spec.dns))
    for port, sock in zip(spec.forward_localhost, forwarded, strict=True):
        targets = [relay.target(ip, port.number) for ip in spec.loopback.addresses]
        relay.start(loop, sock, targets, priority=spec.loopback.priority)


def sweep() -> None:
    """Remove what networks whose processes were killed have left on the host: only bridged ones leave anything, two rules
    in front of a foreign firewall chain (see ``firewall``). Cheap, quiet, and safe beside VMs that run.
    """
    if os.geteuid() == 0:
        from fcvm.network import firewall

        firewall.sweep()
