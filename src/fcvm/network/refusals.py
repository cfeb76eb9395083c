"""Notices that the guest refuses connections to a port, and that it answers there later: somebody should be told.

A packet socket on the tap, in the VM's namespace, whose filter lets nothing pass but the answer to a SYN for which nobody
listens, and the next answer of a port that has refused. Packets towards the guest never get near it, and for others the filter
costs the kernel some nanoseconds.
"""

import ctypes
import socket
import struct
from collections.abc import Callable, Collection
from contextlib import suppress

from fcvm.network import guest
from fcvm.network.loop import BATCH, READ, Loop

SETTLE = 1.0  # seconds from a refusal to its report: a service that has just been started may be about to listen
PAUSE = 10.0  # seconds between two reports

SO_ATTACH_FILTER = 26  # asm-generic/socket.h
ETH_P_IP = 0x0800
_SYN_ACK, _RST_ACK, _FLAGS = 0x12, 0x14, 0x3F  # of TCP, without those of congestion
_HEADERS = 40  # bytes: IPv4 and TCP without options
_REMEMBERED = 100  # ports that have refused; a jump of the filter is 255 instructions at most

Report = Callable[[frozenset[int]], None]


def _equal(here: int, value: int, yes: int, no: int) -> tuple[int, int, int, int]:
    """The instruction at ``here``: go to ``yes`` if what was loaded is ``value``, else to ``no``."""
    return 0x15, yes - here - 1, no - here - 1, value


def _attach(sock: socket.socket, ports: Collection[int]) -> None:
    """Let pass what refuses a connection, and what accepts one to ``ports``."""
    drop = 11 + len(ports)  # where the program drops; it accepts one further
    accept = drop + 1
    program = [  # linux/filter.h
        (0x30, 0, 0, 0),  # the version and length of the IP header:
        _equal(1, 0x45, 2, drop),
        (0x30, 0, 0, 9),
        _equal(3, socket.IPPROTO_TCP, 4, drop),
        (0x30, 0, 0, 33),
        (0x54, 0, 0, _FLAGS),
        _equal(6, _SYN_ACK, 10, 7),
        _equal(7, _RST_ACK, 8, drop),
        (0x20, 0, 0, 24),  # a sequence number of 0: the answer to a first packet (RFC 9293, 3.10.7.1)
        _equal(9, 0, accept, drop),
        (0x28, 0, 0, 20),  # the port
        *(_equal(here, port, accept, here + 1) for here, port in enumerate(ports, 11)),
        (0x06, 0, 0, 0),
        (0x06, 0, 0, _HEADERS),
    ]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(program), ctypes.addressof(buffer)))


def listen() -> socket.socket:
    """The socket; in the namespace.

    Raises:
        OSError: CAP_NET_RAW is missing there.
    """
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
    try:
        _attach(sock, ())
        sock.bind((guest.TAP, ETH_P_IP))
    except BaseException:
        sock.close()
        raise
    return sock


def watch(loop: Loop, sock: socket.socket, refused: Report, answered: Report) -> None:
    """Call ``refused`` with the ports of the guest that refused connections, in the loop's thread, and ``answered`` with
    those of them that accept one later.
    """
    found: set[int] = set()
    silent: set[int] = set()  # refused, and have not accepted since
    waiting = False

    def arrived(_: int) -> None:
        nonlocal waiting
        with suppress(BlockingIOError):
            for _ in range(BATCH):
                port, flags = struct.unpack_from(">H11xB", sock.recv(_HEADERS), 20)
                if flags & _FLAGS == _RST_ACK:
                    found.add(port)
                elif port in silent:
                    silent.remove(port)
                    _attach(sock, silent)
                    answered(frozenset({port}))
        if found and not waiting:
            waiting = True
            loop.after(SETTLE, tell)

    def tell() -> None:
        ports = frozenset(found)
        found.clear()
        silent.update(sorted(ports - silent)[: _REMEMBERED - len(silent)])
        _attach(sock, silent)
        loop.after(PAUSE, again)
        refused(ports)

    def again() -> None:
        nonlocal waiting
        waiting = False
        if found:
            waiting = True
            tell()

    loop.own(sock).setblocking(False)
    loop.call(lambda: loop.watch(sock, READ, arrived))
