"""The guest's end of Firecracker's vsock device, whose streams arrive on the host as they were sent.

Linux since 6.17, and Debian's 6.12, hands what is sent at once to the device in several buffers if it is longer than eight
pages (commit 6693731487a8). If the host reads slowly, Firecracker 1.12 can write only some of these, and then writes them
again: bytes arrive twice (its issue 5475). What is short enough is one buffer, so here nothing longer is sent at once.
"""

import socket
from typing import Any

AT_ONCE = 28 << 10  # bytes; with its headers less than the eight pages of 4 KiB


class Socket(socket.socket):
    """A vsock stream; to send there are ``send`` and ``sendall``."""

    def send(self, data: Any, flags: int = 0) -> int:
        return super().send(memoryview(data)[:AT_ONCE], flags)

    def sendall(self, data: Any, flags: int = 0) -> None:
        view = memoryview(data)
        for start in range(0, len(view), AT_ONCE):
            super().sendall(view[start : start + AT_ONCE], flags)

    def accept(self) -> tuple[socket.socket, Any]:
        connection, address = super().accept()
        return Socket(fileno=connection.detach()), address


def connect(port: int) -> socket.socket:
    """A connection to ``port`` of the host.

    Raises:
        OSError: nobody listens there.
    """
    connection = Socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        connection.connect((socket.VMADDR_CID_HOST, port))
    except BaseException:
        connection.close()
        raise
    return connection


def listen(port: int) -> socket.socket:
    """A listener for the host's connections to ``port``."""
    listener = Socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((socket.VMADDR_CID_ANY, port))
    listener.listen(256)
    return listener
