"""Notices that the guest refuses a connection to a port: somebody should be told why.

A packet socket on the tap, in the VM's namespace, whose filter lets nothing pass but the answer to a SYN for which nobody
listens. Packets towards the guest never get near it, and for others the filter costs the kernel some nanoseconds.
"""

import ctypes
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

from fcvm.network import guest
from fcvm.network.loop import READ, Loop

SETTLE = 1.0  # seconds from a refusal to its report: a service that has just been started may be about to listen
PAUSE = 10.0  # seconds between two reports

SO_ATTACH_FILTER = 26  # asm-generic/socket.h
ETH_P_IP = 0x0800
_HEADERS = 40  # bytes: IPv4 and TCP without options
# (code, jump if true, jump if false, operand) of linux/filter.h; a jump to the end drops
_FILTER = [
    (0x30, 0, 0, 0),  # the version and length of the IP header:
    (0x15, 0, 7, 0x45),
    (0x30, 0, 0, 9),  # TCP
    (0x15, 0, 5, socket.IPPROTO_TCP),
    (0x30, 0, 0, 33),  # RST and ACK
    (0x15, 0, 3, 0x14),
    (0x20, 0, 0, 24),  # a sequence number of 0: the answer to a first packet (RFC 9293, 3.10.7.1)
    (0x15, 0, 1, 0),
    (0x06, 0, 0, _HEADERS),
    (0x06, 0, 0, 0),
]


def listen() -> socket.socket:
    """The socket; in the namespace.

    Raises:
        OSError: CAP_NET_RAW is missing there.
    """
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
    try:
        code = b"".join(struct.pack("=HBBI", *instruction) for instruction in _FILTER)
        buffer = ctypes.create_string_buffer(code)
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(_FILTER), ctypes.addressof(buffer)))
        sock.bind((guest.TAP, ETH_P_IP))
    except BaseException:
        sock.close()
        raise
    return sock


def watch(loop: Loop, sock: socket.socket, report: Callable[[frozenset[int]], None]) -> None:
    """Call ``report`` with the ports of the guest that refused connections, in the loop's thread."""
    refused: set[int] = set()
    waiting = False

    def arrived(_: int) -> None:
        nonlocal waiting
        with suppress(BlockingIOError):
            while True:
                refused.update(struct.unpack_from(">H", sock.recv(_HEADERS), 20))
        if not waiting:
            waiting = True
            loop.after(SETTLE, tell)

    def tell() -> None:
        found = frozenset(refused)
        refused.clear()
        loop.after(PAUSE, again)
        report(found)

    def again() -> None:
        nonlocal waiting
        waiting = False
        if refused:
            waiting = True
            tell()

    loop.own(sock).setblocking(False)
    loop.call(lambda: loop.watch(sock, READ, arrived))
