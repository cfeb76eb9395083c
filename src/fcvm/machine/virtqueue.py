"""Guest memory and split virtqueues as a device sees them (Virtual I/O Device specification 1.2, section 2.7).

The guest (driver) puts chains of buffers into the *available* ring; ``Virtqueue.pop`` returns the next one as
memoryviews straight into guest memory, ``push`` hands it back through the *used* ring. Whoever owns the queue
notifies the driver. Everything a guest writes is checked: a bad index, address or chain raises ``ValueError``.
"""

import mmap
import struct

from fc_agent.structs import Struct

# struct virtq_desc: address, length, flags, next
_DESCRIPTOR = struct.Struct("<QIHH")
_USED_ELEMENT = struct.Struct("<II")
_U16 = struct.Struct("<H")

VIRTQ_DESC_F_NEXT = 1
VIRTQ_DESC_F_WRITE = 2
VIRTQ_DESC_F_INDIRECT = 4

LARGEST_QUEUE = 32768


class Region(Struct):
    """``size`` bytes of guest memory: at ``guest`` for the guest, at ``user`` for the VMM, ``view`` for us."""

    guest: int
    user: int
    size: int
    view: memoryview


class Memory:
    """The guest's memory, region by region."""

    def __init__(self, regions: list[Region]) -> None:
        self.regions = regions

    @staticmethod
    def map(fd: int, guest: int, user: int, size: int, offset: int) -> Region:
        """Map ``size`` bytes at ``offset`` of the shared memory file ``fd``; ``fd`` may be closed afterwards."""
        return Region(guest, user, size, memoryview(mmap.mmap(fd, offset + size))[offset:])

    def at_guest(self, address: int, size: int) -> memoryview:
        """The ``size`` bytes at guest address ``address``. Raises ValueError: they are not (all) memory."""
        for region in self.regions:
            start = address - region.guest
            if 0 <= start <= region.size - size:
                return region.view[start : start + size]
        raise ValueError(f"no guest memory at {address:#x}+{size}")

    def at_user(self, address: int, size: int) -> memoryview:
        """The ``size`` bytes that the VMM has at ``address``. Raises ValueError: they are not (all) guest memory."""
        for region in self.regions:
            start = address - region.user
            if 0 <= start <= region.size - size:
                return region.view[start : start + size]
        raise ValueError(f"no guest memory at the VMM's {address:#x}+{size}")


class Chain(Struct):
    """One request: the buffers that the driver filled and those that it wants filled, in order."""

    head: int
    readable: list[memoryview]
    writable: list[memoryview]


class Virtqueue:
    """One split virtqueue of ``size`` entries; ``desc``, ``avail`` and ``used`` are addresses of the VMM.

    ``index`` is the next entry of the available ring, which a device that stops and starts again carries over.
    """

    def __init__(self, memory: Memory, size: int, desc: int, avail: int, used: int, index: int) -> None:
        if not 0 < size <= LARGEST_QUEUE or size & (size - 1):
            raise ValueError(f"a virtqueue of {size} entries")
        self._memory = memory
        self._size = size
        self._desc = memory.at_user(desc, 16 * size)
        self._avail = memory.at_user(avail, 4 + 2 * size)
        self._used = memory.at_user(used, 4 + 8 * size)
        # The indices, which the driver reads and writes at any moment: loaded and stored whole, which ``struct`` does not
        # do (it zeroes first, then writes byte by byte).
        self._available = self._avail[2:4].cast("H")
        self._published = self._used[2:4].cast("H")
        self.index = index
        self._used_index = self._published[0]

    def pop(self) -> Chain | None:
        """The next request, or None when there is none."""
        if self._available[0] == self.index:
            return None
        head: int = _U16.unpack_from(self._avail, 4 + 2 * (self.index % self._size))[0]
        self.index = (self.index + 1) & 0xFFFF
        return self._chain(head)

    def push(self, head: int, written: int) -> None:
        """Give the request ``head`` back with ``written`` bytes in its writable buffers."""
        _USED_ELEMENT.pack_into(self._used, 4 + 8 * (self._used_index % self._size), head, written)
        self._used_index = (self._used_index + 1) & 0xFFFF
        self._published[0] = self._used_index  # after the element: this is what publishes it

    def _chain(self, head: int) -> Chain:
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        table, entries, index = self._desc, self._size, head
        steps = 0
        while True:
            if index >= entries or steps > LARGEST_QUEUE:
                raise ValueError(f"descriptor {index} of {entries} in chain {head}")
            steps += 1
            address, length, flags, following = _DESCRIPTOR.unpack_from(table, 16 * index)
            if flags & VIRTQ_DESC_F_INDIRECT:
                table, entries, index = self._memory.at_guest(address, length), length // 16, 0
                continue
            (writable if flags & VIRTQ_DESC_F_WRITE else readable).append(self._memory.at_guest(address, length))
            if not flags & VIRTQ_DESC_F_NEXT:
                return Chain(head, readable, writable)
            index = following
