"""The device's side of the vhost-user protocol: QEMU shows the guest a virtio device, we are what it does.

QEMU passes the guest's memory and each queue's addresses and eventfds over a Unix socket; from then on requests go
between the guest and this process without it. ``Backend.serve`` runs the protocol and the queues on the calling
thread. Message numbers and layouts: QEMU's ``docs/interop/vhost-user.rst``.
"""

import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

from fcvm.machine.virtqueue import Chain, Memory, Virtqueue

GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE = 1, 2, 3, 4, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE, GET_CONFIG = 15, 16, 17, 18, 24

VERSION, REPLY, NEED_REPLY = 1, 1 << 2, 1 << 3

# Bits of the device's features and of the protocol's.
VIRTIO_RING_F_INDIRECT_DESC, VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_F_VERSION_1 = 28, 30, 32
PROTOCOL_F_MQ, PROTOCOL_F_REPLY_ACK, PROTOCOL_F_CONFIG = 0, 3, 9

_HEADER = struct.Struct("<III")  # request, flags, size of the payload
_U64 = struct.Struct("<Q")
_STATE = struct.Struct("<II")  # queue, number
_ADDRESSES = struct.Struct("<IIQQQQ")  # queue, flags, descriptors, used, available, log
_REGION = struct.Struct("<QQQQ")  # guest address, size, user address, offset in the file
_CONFIG = struct.Struct("<III")  # offset, size, flags
NO_FD = 1 << 8  # in a vring's fd message: none was passed

Complete = Callable[[int], None]
Handler = Callable[[int, Chain, Complete], None]


class _Ring:
    """What QEMU has told about one queue, and the queue while it runs."""

    def __init__(self) -> None:
        self.size = 0
        self.base = 0
        self.addresses: tuple[int, int, int] | None = None
        self.kick = -1
        self.call = -1
        self.enabled = False
        self.queue: Virtqueue | None = None
        self.generation = 0  # one more with every stop
        self.lock = threading.Lock()  # handlers may complete on other threads


class Backend:
    """A device with ``queues`` virtqueues, served over the connected socket ``sock``.

    ``handle(queue, chain, complete)`` is called for every request and must call ``complete(written)`` once, at once
    or later and on any thread. ``stopped(queue)`` is called when the guest or QEMU stops a queue: the requests that it
    had are void. ``config`` is the device's configuration space.
    """

    def __init__(
        self,
        sock: socket.socket,
        queues: int,
        handle: Handler,
        *,
        config: bytes = b"",
        stopped: Callable[[int], None] | None = None,
    ) -> None:
        self._sock = sock
        self._rings = [_Ring() for _ in range(queues)]
        self._handle = handle
        self._config = config
        self._stopped = stopped
        self._epoll = select.epoll()
        self._ready: dict[int, Callable[[int], None]] = {}
        self._memory = Memory([])
        self._thread = 0
        self._to_notify: set[int] = set()

    def watch(self, fd: int, events: int, ready: Callable[[int], None]) -> None:
        """Call ``ready(events)`` in ``serve``'s loop when ``fd`` is (EPOLLIN...), or has hung up. Only from that thread."""
        if fd in self._ready:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._ready[fd] = ready

    def unwatch(self, fd: int) -> None:
        """Undo ``watch``, before ``fd`` is closed."""
        if self._ready.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def serve(self) -> None:
        """Serve until QEMU closes the connection. Raises ValueError, OSError: QEMU or the guest broke the protocol."""
        self._thread = threading.get_ident()
        self._epoll.register(self._sock, select.EPOLLIN)
        try:
            while True:
                for fd, events in self._epoll.poll():
                    if fd in self._ready:
                        self._ready[fd](events)
                    elif fd == self._sock.fileno() and not self._message():
                        return
                for number in self._to_notify:
                    self._notify(self._rings[number])
                self._to_notify.clear()
        finally:
            self._epoll.close()
            for ring in self._rings:
                _close(ring.kick, ring.call)

    def _message(self) -> bool:
        header, fds, _, _ = socket.recv_fds(self._sock, _HEADER.size, 16)
        if not header:
            return False
        try:
            request, flags, size = _HEADER.unpack(header)
            payload = self._sock.recv(size, socket.MSG_WAITALL) if size else b""
            reply = self._request(request, payload, fds)
        finally:
            _close(*fds)
        if reply is None and flags & NEED_REPLY:
            reply = _U64.pack(0)
        if reply is not None:
            self._sock.sendall(_HEADER.pack(request, VERSION | REPLY, len(reply)) + reply)
        return True

    def _request(self, request: int, payload: bytes, fds: list[int]) -> bytes | None:
        """Carry one message out; takes the descriptors it keeps out of ``fds``. Returns the reply it calls for."""
        if request == GET_FEATURES:
            features = (VIRTIO_RING_F_INDIRECT_DESC, VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_F_VERSION_1)
            return _U64.pack(sum(1 << bit for bit in features))
        if request == GET_PROTOCOL_FEATURES:
            config = 1 << PROTOCOL_F_CONFIG if self._config else 0
            return _U64.pack(1 << PROTOCOL_F_MQ | 1 << PROTOCOL_F_REPLY_ACK | config)
        if request == GET_QUEUE_NUM:
            return _U64.pack(len(self._rings))
        if request == GET_CONFIG:
            offset, size, flags = _CONFIG.unpack_from(payload)
            return _CONFIG.pack(offset, size, flags) + self._config[offset : offset + size].ljust(size, b"\0")
        if request == SET_MEM_TABLE:
            self._set_memory(payload, fds)
        elif request == SET_VRING_NUM:
            index, size = _STATE.unpack(payload)
            self._rings[index].size = size
        elif request == SET_VRING_ADDR:
            index, _, desc, used, avail, _ = _ADDRESSES.unpack(payload)
            self._rings[index].addresses = (desc, avail, used)
        elif request == SET_VRING_BASE:
            index, base = _STATE.unpack(payload)
            self._rings[index].base = base
        elif request == GET_VRING_BASE:  # stops the queue
            index, _ = _STATE.unpack(payload)
            self._stop(self._rings[index])
            return _STATE.pack(index, self._rings[index].base)
        elif request in (SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR):
            self._set_descriptor(request, _U64.unpack(payload)[0], fds)
        elif request == SET_VRING_ENABLE:
            index, enabled = _STATE.unpack(payload)
            ring = self._rings[index]
            ring.enabled = bool(enabled)
            self._start(ring) if enabled else self._stop(ring)
        # SET_FEATURES, SET_PROTOCOL_FEATURES, SET_OWNER and the like: nothing that we do depends on them.
        return None

    def _set_memory(self, payload: bytes, fds: list[int]) -> None:
        count = struct.unpack_from("<I", payload)[0]
        regions = [_REGION.unpack_from(payload, 8 + i * _REGION.size) for i in range(count)]
        self._memory = Memory(
            [Memory.map(fd, guest, user, size, offset) for fd, (guest, size, user, offset) in zip(fds, regions, strict=True)]
        )
        for ring in self._rings:
            with ring.lock:
                if ring.queue is not None and ring.addresses is not None:  # the same queue, mapped anew
                    ring.queue = Virtqueue(self._memory, ring.size, *ring.addresses, ring.queue.index)

    def _set_descriptor(self, request: int, value: int, fds: list[int]) -> None:
        ring = self._rings[value & 0xFF]
        fd = -1 if value & NO_FD else fds.pop()
        if request == SET_VRING_KICK:
            self._stop(ring)
            _close(ring.kick)
            ring.kick = fd
            self._start(ring)
        elif request == SET_VRING_CALL:
            with ring.lock:
                _close(ring.call)
                ring.call = fd
        else:  # for errors; we end with an exception instead
            _close(fd)

    def _start(self, ring: _Ring) -> None:
        if ring.queue is None and ring.enabled and ring.kick >= 0 and ring.addresses is not None:
            with ring.lock:
                ring.queue = Virtqueue(self._memory, ring.size, *ring.addresses, ring.base)
            self.watch(ring.kick, select.EPOLLIN, lambda _events: self._kicked(ring))
            self._drain(ring)

    def _stop(self, ring: _Ring) -> None:
        if ring.queue is not None:
            self.unwatch(ring.kick)
            with ring.lock:
                ring.base = ring.queue.index
                ring.queue = None
                ring.generation += 1
            if self._stopped is not None:
                self._stopped(self._rings.index(ring))

    def _kicked(self, ring: _Ring) -> None:
        with suppress(BlockingIOError):
            os.read(ring.kick, 8)
        self._drain(ring)

    def _drain(self, ring: _Ring) -> None:
        number = self._rings.index(ring)
        while ring.queue is not None and (chain := ring.queue.pop()) is not None:
            self._handle(number, chain, self._completion(number, chain.head))

    def _completion(self, number: int, head: int) -> Complete:
        ring = self._rings[number]
        generation = ring.generation

        def complete(written: int) -> None:
            with ring.lock:
                if ring.queue is None or ring.generation != generation:  # a reset: nobody waits any more
                    return
                ring.queue.push(head, written)
                if threading.get_ident() == self._thread:  # one interrupt for all that this round does
                    self._to_notify.add(number)
                    return
            self._notify(ring)

        return complete

    @staticmethod
    def _notify(ring: _Ring) -> None:
        with ring.lock:
            if ring.call >= 0:
                os.write(ring.call, _U64.pack(1))


def _close(*fds: int) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)
