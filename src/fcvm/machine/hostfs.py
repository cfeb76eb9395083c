"""The host's files in the machine: a virtio-fs device served by fcvm's own FUSE server.

virtio-fs carries the kernel's FUSE messages in virtqueues, so the server of ``--map`` (``fuse_pipe``) serves it as it is:
one request in, one reply out. It runs with the rights of the user whose machine it is, and as root with those of the
process in the machine that asks.

virtio-fs has no way to tell the guest of changes, so nothing that the host could change is believed for any time: names
and attributes are asked for again every time, and cached data is dropped when a file's time or size has changed.
"""

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from queue import SimpleQueue

from fcvm.machine.vhost_user import Backend, Complete
from fcvm.machine.virtqueue import Chain
from fuse_pipe import messages, operations
from fuse_pipe.nodes import Node, state_of
from fuse_pipe.session import Session
from fuse_pipe.volume import Volume
from fuse_pipe.worker import this_worker

QUEUES = 2  # high priority (forgets), and one for requests
WORKERS = 4  # threads for requests that may take long

_HEADER = struct.Struct("<II")  # struct fuse_in_header: length, opcode

Reply = bytes | bytearray | memoryview
Handle = Callable[[bytes], "Iterable[Reply] | None"]


class HostVolume(Volume):
    """The host's files as the machine's kernel is told of them: true now, and not a moment longer."""

    def __init__(self, root: str = "/") -> None:
        super().__init__(root, owner=(os.geteuid(), os.getegid()), watch=False)

    def file_time(self, node: Node, info: os.stat_result) -> int:
        return 0

    def entry(self, parent: Node, name: bytes, info: os.stat_result) -> bytes:
        node = self.table.learn(parent, name, info)
        node.told = state_of(info)
        return messages.ENTRY_OUT.pack(node.id, 0, 0, 0, 0, 0, *self.attributes(info))


def serve_host(sock: socket.socket, root: str = "/") -> None:
    """Serve ``root`` to the device at the other end of ``sock`` until QEMU ends."""
    session = Session("machine", HostVolume(root))
    try:
        serve(sock, lambda request: session.execute(this_worker(), memoryview(request)))
    finally:
        session.close()


def serve(sock: socket.socket, handle: Handle) -> None:
    """Serve the device at the other end of ``sock`` until QEMU ends.

    Arguments:
        handle: takes a FUSE request and returns the reply's parts; None where the protocol has no reply.
    """
    slow: SimpleQueue[tuple[bytes, Chain, Complete]] = SimpleQueue()

    def answer(request: bytes, chain: Chain, complete: Complete) -> None:
        reply = handle(request)
        complete(0 if reply is None else scatter(reply, chain.writable))

    def work() -> None:
        while True:
            answer(*slow.get())

    def on_request(_queue: int, chain: Chain, complete: Complete) -> None:
        request = bytes(chain.readable[0]) if len(chain.readable) == 1 else b"".join(chain.readable)
        opcode = _HEADER.unpack_from(request)[1]
        if opcode == messages.SETLKW:  # it may wait for ever, so it must not keep a worker from others
            threading.Thread(target=answer, args=(request, chain, complete), daemon=True, name="hostfs lock").start()
        elif opcode in operations.SLOW:
            slow.put((request, chain, complete))
        else:
            answer(request, chain, complete)

    for _ in range(WORKERS):
        threading.Thread(target=work, daemon=True, name="hostfs worker").start()
    Backend(sock, QUEUES, on_request).serve()


def scatter(parts: "Iterable[Reply]", buffers: list[memoryview]) -> int:
    """Copy ``parts`` into guest memory, buffer by buffer; returns the number of bytes. What does not fit is dropped."""
    total = 0
    targets = iter(buffers)
    target = memoryview(b"")
    for part in parts:
        source = memoryview(part).cast("B")
        while source:
            if not target:
                following = next(targets, None)
                if following is None:
                    return total
                target = following
                continue
            count = min(len(source), len(target))
            target[:count] = source[:count]
            target, source = target[count:], source[count:]
            total += count
    return total
