"""Publishes ports of the machine on the user's host: for the keeper.

A port is taken by sockets of the keeper's own first, so that what is wrong with it is told as on a host with KVM. IPv4 is then
QEMU's, whose user network knows nothing else; at IPv6 the keeper listens and passes on to where QEMU does.
"""

import socket
import threading

from fc_agent.structs import Struct
from fcvm.errors import FcvmError
from fcvm.machine.addresses import ADDRESS
from fcvm.machine.qmp import Monitor
from fcvm.network import ports, relay
from fcvm.network.loop import Loop
from fcvm.network.publish import Publish

LOOPBACK = "127.0.0.1"
_ATTEMPTS = 8


class _Published(Struct):
    """What has to be undone: QEMU's listener, and our sockets."""

    forward: tuple[str, str, int]
    sockets: tuple[socket.socket, ...]


class Ports:
    """The ports that are published, by the numbers that the machine's agent has given them."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._published: dict[int, _Published] = {}
        self._loop: Loop | None = None

    def publish(self, number: int, wanted: Publish) -> int:
        """Let ``wanted.host_port`` (0: any free one) lead to ``wanted.guest_port`` of the machine; returns the host's port.

        Raises:
            ConflictError, HostError, NetworkError: it cannot be had.
        """
        for attempt in range(_ATTEMPTS):
            (reservation,) = ports.reserve([wanted])
            try:
                self._published[number] = self._serve(reservation)
                return reservation.publish.host_port
            except FcvmError:
                reservation.close()
                # between our giving a free port up and QEMU's taking it, it may have become another's
                if wanted.host_port or attempt == _ATTEMPTS - 1:
                    raise
            except BaseException:
                reservation.close()
                raise
        raise AssertionError

    def _serve(self, reservation: ports.Reservation) -> _Published:
        publish = reservation.publish
        ours = reservation.release(socket.AF_INET).sockets
        if ":" in publish.host_ip:
            ip, port = LOOPBACK, 0
        else:
            ip, port = publish.host_ip, publish.host_port
        loop = self._running() if ours else None
        port = self._monitor.forward(publish.protocol, ip, port, ADDRESS, publish.guest_port)
        for held in ours:
            assert loop is not None
            relay.start(loop, held, [relay.target(ip or LOOPBACK, port)])
        return _Published((publish.protocol, ip, port), ours)

    def withdraw(self, number: int) -> None:
        """Take a port back, if it is published; connections that are open stay.

        Raises:
            MachineError: QEMU does not answer; its listener stays.
        """
        published = self._published.pop(number, None)
        if published is None:
            return
        if published.sockets:
            loop, dropped = self._running(), threading.Event()

            def drop() -> None:
                for held in published.sockets:
                    loop.drop(held)
                dropped.set()

            loop.call(drop)
            dropped.wait()  # the port may be published again at once
        self._monitor.cancel(*published.forward)

    def close(self) -> None:
        """End the relays; QEMU's listeners end with it."""
        if self._loop is not None:
            self._loop.close()

    def _running(self) -> Loop:
        """The relays' loop: a thread that most machines never need."""
        if self._loop is None:
            self._loop = Loop()
            self._loop.start()
        return self._loop
