"""The other side of a virtio device, for tests: a guest's driver and QEMU's half of vhost-user, on real memory."""

import os
import select
import socket
import struct

from fcvm.machine import vhost_user
from fcvm.machine.virtqueue import Memory, Virtqueue

SIZE = 8  # entries of a queue
DESC, AVAIL, USED, BUFFERS = 0x0, 0x1000, 0x2000, 0x4000  # offsets in the shared memory
QUEUE = 0x40000  # what each queue has of it
LENGTH = 2 * QUEUE
GUEST, USER = 0x8000_0000, 0x7F00_0000_0000  # where guest and VMM have the memory
NEXT, WRITE, INDIRECT = 1, 2, 4


class Driver:
    """What a guest does: descriptors and the available ring, in memory shared with the device.

    Each queue has ``QUEUE`` bytes of the memory; ``view`` shows those of this one.
    """

    def __init__(self, shared: "Driver | None" = None) -> None:
        self.fd = os.dup(shared.fd) if shared else os.memfd_create("guest")
        os.ftruncate(self.fd, LENGTH)
        self.offset = QUEUE if shared else 0
        self.region = Memory.map(self.fd, GUEST, USER, LENGTH, 0)
        self.memory = Memory([self.region])
        self.view = self.region.view[self.offset :]
        self.index = 0

    def close(self) -> None:
        os.close(self.fd)

    def addresses(self) -> tuple[int, int, int]:
        """Where the VMM has the descriptors and the two rings."""
        base = USER + self.offset
        return base + DESC, base + AVAIL, base + USED

    def queue(self, index: int = 0) -> Virtqueue:
        return Virtqueue(self.memory, SIZE, *self.addresses(), index)

    def descriptor(self, number: int, offset: int, length: int, flags: int = 0, following: int = 0, table: int = DESC) -> None:
        where = GUEST + self.offset + offset
        struct.pack_into("<QIHH", self.view, table + 16 * number, where, length, flags, following)

    def offer(self, head: int) -> None:
        struct.pack_into("<H", self.view, AVAIL + 4 + 2 * (self.index % SIZE), head)
        self.index = (self.index + 1) & 0xFFFF
        struct.pack_into("<H", self.view, AVAIL + 2, self.index)

    def used(self) -> tuple[int, list[tuple[int, int]]]:
        count = struct.unpack_from("<H", self.view, USED + 2)[0]
        return count, [struct.unpack_from("<II", self.view, USED + 4 + 8 * i) for i in range(min(count, SIZE))]


class Qemu:
    """The front end of vhost-user, for a device that is already connected."""

    def __init__(self, driver: Driver, sock: socket.socket) -> None:
        self.driver = driver
        self.sock = sock
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        self.call = os.eventfd(0)

    def send(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (), *, reply: bool = False) -> bytes:
        flags = 1 | (0 if reply else 8)  # version 1; where there is no reply, ask for an acknowledgement
        socket.send_fds(self.sock, [struct.pack("<III", request, flags, len(payload)) + payload], list(fds))
        header = self.sock.recv(12, socket.MSG_WAITALL)
        answered, flags, size = struct.unpack("<III", header)
        assert answered == request
        assert flags & 4
        answer = self.sock.recv(size, socket.MSG_WAITALL)
        if not reply:
            assert struct.unpack("<Q", answer) == (0,)
        return answer

    def set_up(self, queue: int) -> None:
        """Negotiate, and start one queue with our driver."""
        features = struct.unpack("<Q", self.send(vhost_user.GET_FEATURES, reply=True))[0]
        assert features >> 32 & 1, "not a modern device"
        self.send(vhost_user.SET_FEATURES, struct.pack("<Q", features))
        table = struct.pack("<II", 1, 0) + struct.pack("<QQQQ", GUEST, LENGTH, USER, 0)
        self.send(vhost_user.SET_MEM_TABLE, table, (self.driver.fd,))
        self.send(vhost_user.SET_VRING_NUM, struct.pack("<II", queue, SIZE))
        self.send(vhost_user.SET_VRING_BASE, struct.pack("<II", queue, 0))
        desc, avail, used = self.driver.addresses()
        self.send(vhost_user.SET_VRING_ADDR, struct.pack("<IIQQQQ", queue, 0, desc, used, avail, 0))
        self.send(vhost_user.SET_VRING_KICK, struct.pack("<Q", queue), (self.kick,))
        self.send(vhost_user.SET_VRING_CALL, struct.pack("<Q", queue), (self.call,))
        self.send(vhost_user.SET_VRING_ENABLE, struct.pack("<II", queue, 1))

    def interrupt(self) -> None:
        """Wait for the device's interrupt."""
        assert select.select([self.call], [], [], 60)[0], "no interrupt"
        os.eventfd_read(self.call)

    def close(self) -> None:
        self.sock.close()
        os.close(self.kick)
        os.close(self.call)
