"""Ports of the host: taken before the VM boots and held while it runs, by sockets of our own.

A socket that is bound is the only reservation that every other program respects and that no crash leaves behind. It also
serves: what does not reach the guest through the kernel's translation (IPv6, say) arrives there and is relayed.
"""

import errno
import os
import socket
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from fc_agent.structs import Struct, replace
from fcvm.errors import ConflictError, FcvmError, HostError, NetworkError
from fcvm.network.publish import Publish

_FREE_PORT_ATTEMPTS = 32
_BACKLOG = 128
_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp
_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


class Reservation(Struct):
    """A published port with its number decided, and the sockets (one an address family) that hold it."""

    publish: Publish
    sockets: tuple[socket.socket, ...]

    def close(self) -> None:
        """Give the port back."""
        for held in self.sockets:
            held.close()

    def release(self, family: int) -> "Reservation":
        """Give the port back in one address family, so that somebody else can bind it there."""
        for held in self.sockets:
            if held.family == family:
                held.close()
        return Reservation(self.publish, tuple(held for held in self.sockets if held.fileno() >= 0))


def reserve(wanted: Iterable[Publish]) -> tuple[Reservation, ...]:
    """Take every port, and decide the free ones; all of them or none.

    Raises:
        ConflictError: one is in use; the message says by whom if that can be seen.
        HostError: it needs rights that we do not have.
        NetworkError: the address is not one of this host.
    """
    with ExitStack() as undo:
        taken = []
        for publish in wanted:
            reservation = _reserve(publish)
            undo.callback(reservation.close)
            taken.append(reservation)
        undo.pop_all()
        return tuple(taken)


def _reserve(publish: Publish) -> Reservation:
    for attempt in range(_FREE_PORT_ATTEMPTS):
        try:
            return _bind(publish)
        except OSError as error:
            # a free IPv4 port may be taken in IPv6: then try another
            if publish.host_port or error.errno != errno.EADDRINUSE or attempt == _FREE_PORT_ATTEMPTS - 1:
                raise explain(error, publish) from error
    raise AssertionError


def _bind(publish: Publish) -> Reservation:
    port = publish.host_port
    with ExitStack() as undo:
        sockets = []
        for family, ip in _addresses(publish.host_ip):
            try:
                sock = undo.enter_context(socket.socket(family, _KINDS[publish.protocol]))
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                if publish.protocol == "tcp":  # not for a listener, but for what is left of its old connections
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((ip, port))
                if publish.protocol == "tcp":
                    sock.listen(_BACKLOG)
            except OSError as error:
                missing = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
                if publish.host_ip == "" and family == socket.AF_INET6 and error.errno in missing:
                    continue  # a host without IPv6
                raise
            sock.setblocking(False)
            port = sock.getsockname()[1]
            sockets.append(sock)
        undo.pop_all()
        return Reservation(replace(publish, host_port=port), tuple(sockets))


def _addresses(host_ip: str) -> list[tuple[int, str]]:
    if host_ip == "":
        return [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")]
    return [(socket.AF_INET6 if ":" in host_ip else socket.AF_INET, host_ip)]


def explain(error: OSError, publish: Publish) -> FcvmError:
    """Why a port cannot be taken, for the user."""
    where = f"{publish.host_port}/{publish.protocol}" + (f" of {publish.host_ip}" if publish.host_ip else "")
    if error.errno == errno.EADDRINUSE:
        by = owner(publish.protocol, publish.host_port) if publish.host_port else None
        return ConflictError(
            f"Port {where} is in use{f' by {by}' if by else ''}.",
            hint=f"publish another port of the host, or any free one: --publish {_free(publish)}",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return HostError(
            f"Port {where} needs root: ports below {_first_unprivileged()} are privileged on this host.",
            hint=f"--publish {publish.guest_port + 8000 if publish.guest_port < 1024 else 8080}:{publish.guest_port}, or "
            f"sudo sysctl net.ipv4.ip_unprivileged_port_start={publish.host_port}",
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return NetworkError(
            f"{publish.host_ip} is not an address of this host, so no port can be published on it.",
            hint="ip -brief address",
        )
    return NetworkError(f"Port {where} cannot be published: {error.strerror or error}.")


def _free(publish: Publish) -> str:
    return str(replace(publish, host_port=0)).removesuffix("/tcp")


def _first_unprivileged() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    except (OSError, ValueError):
        return 1024


def owner(protocol: str, port: int) -> str | None:
    """Who has a port, as ``nginx (pid 812)``; None if that cannot be seen (another user's process)."""
    inodes = set()
    for family in ("", "6"):
        with suppress(OSError):
            for line in Path(f"/proc/thread-self/net/{protocol}{family}").read_text().splitlines()[1:]:
                words = line.split()
                if int(words[1].rpartition(":")[2], 16) == port and (protocol == "udp" or words[3] == _LISTEN):
                    inodes.add(f"socket:[{words[9]}]")
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with suppress(OSError):  # it has ended, or is another user's
                for fd in os.listdir(process / "fd"):
                    with suppress(OSError):
                        if os.readlink(process / "fd" / fd) in inodes:
                            return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
    return None
