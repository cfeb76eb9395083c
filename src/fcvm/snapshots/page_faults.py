"""The process that answers page faults of clones that use the uffd backend.

It holds one memory file and any number of clones of it. A fault brings in the 64 KiB window around it: a round trip
costs 20 to 75 us whatever it carries (docs/performance.md), and what a guest touches next is usually beside it. Pages
that the file does not hold become zero pages. What a clone gives back through its balloon reads as zeros afterwards.

What is known of a clone's pages lies in memory shared with the owner of this process (memory.py), one byte a page, so
that another process can carry on if this one dies. The owner sends clones over a socket, our standard input; its end
is our end.

After a fault the loop spins for a millisecond before it blocks: the next one is usually near, and being woken would
take most of its time (16 us against 51 us a fault). But only while a CPU is idle: on a busy host a process that spins
is one that the scheduler makes wait, and faults took twice as long.
"""

from __future__ import annotations

import errno
import gc
import json
import mmap
import os
import re
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from fc_agent.structs import Struct
from fcvm.linux.files import extents
from fcvm.linux.memory import ReadOnly
from fcvm.linux.userfaultfd import EVENT_PAGEFAULT, EVENT_REMOVE, Userfaultfd
from fcvm.snapshots import working_set

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PAGE = 4096
WINDOW = 16  # pages brought in by one fault
HOLE_WINDOW = 256  # pages, where the file holds none: a zero page costs next to nothing
CHUNK = 256  # pages of a working set that are replayed between two looks for faults
SPIN = 0.001  # seconds
LOOK = 0.01  # seconds for which "a CPU is idle" is believed

# The state of a page, one byte of two bits. A removed page reads as zeros for ever after, whatever the file holds.
PRESENT, REMOVED = 1, 2
_TO_PRESENT = bytes(value | PRESENT for value in range(256))

HEADER = 4096  # bytes before the states in the shared memory: the counters
COUNTERS = struct.Struct("=5Q")  # faults, pages copied, pages zeroed, pages removed, pages replayed


class Region(Struct):
    """A piece of a guest's memory: ``size`` bytes at ``address`` in Firecracker, at ``offset`` in the memory file."""

    address: int
    size: int
    offset: int


def regions(message: list[dict[str, Any]]) -> list[Region]:
    """What Firecracker says in its handshake; raises ValueError for what we cannot serve."""
    found = []
    for entry in message:
        size = entry.get("page_size", entry.get("page_size_kib", PAGE))
        if size not in (PAGE, PAGE // 1024):
            raise ValueError(f"pages of {size} bytes are not supported")
        found.append(Region(entry["base_host_virt_addr"], entry["size"], entry["offset"]))
    return found


class Memory:
    """A snapshot's memory file: mapped, and which of its pages hold data. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.mapping = ReadOnly(self.fd)
        self.address = self.mapping.address
        self.pages = self.mapping.size // PAGE
        self.data = bytes(self._data())

    def _data(self) -> bytearray:
        found = bytearray(self.pages)
        for start, end in extents(self.fd):
            first, last = start // PAGE, min(self.pages, -(-end // PAGE))
            found[first:last] = b"\1" * (last - first)
        return found

    def read_ahead(self, ranges: list[tuple[int, int]]) -> None:
        """Have the kernel read these pages, all at once and in the background: it matters when they are not cached."""
        for first, count in ranges:
            os.posix_fadvise(self.fd, first * PAGE, count * PAGE, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        self.mapping.close()
        os.close(self.fd)


class Clone:
    """One clone's memory: its userfaultfd, the states of its pages, and its counters."""

    def __init__(self, number: int, uffd: Userfaultfd, hangup: int, shared: int, layout: list[Region]):
        self.number = number
        self.uffd = uffd
        self.hangup = hangup
        self.regions = layout
        self.memory = mmap.mmap(shared, 0)
        self.state = memoryview(self.memory)[HEADER:]
        self.faults, self.copied, self.zeroed, self.removed, self.replayed = COUNTERS.unpack_from(self.memory)
        self.pending: deque[int] = deque()  # addresses of faults that are read but not answered
        self.gone = False

    def locate(self, address: int) -> tuple[Region, int]:
        """The region that holds ``address``, and its page number in the file."""
        for region in self.regions:
            if region.address <= address < region.address + region.size:
                return region, (address - region.address + region.offset) // PAGE
        raise ValueError(f"fault at {address:#x}, outside the guest's memory")

    def publish(self) -> None:
        """Put the counters where the owner sees them."""
        COUNTERS.pack_into(self.memory, 0, self.faults, self.copied, self.zeroed, self.removed, self.replayed)

    def close(self) -> None:
        self.uffd.close()
        os.close(self.hangup)
        self.state.release()
        self.memory.close()


class Server:
    """Answers the faults of the clones that come in over ``control``, until that is closed."""

    def __init__(self, memory: Memory, control: socket.socket) -> None:
        self.memory = memory
        self.control = control
        self.window = WINDOW
        self.working_set: list[tuple[int, int]] = []
        self.clones: dict[int, Clone] = {}  # by the descriptors of their userfaultfd and their hang-up
        self.replays: deque[tuple[Clone, Iterator[tuple[int, int]]]] = deque()
        self.poll = select.epoll()
        self.poll.register(control, select.EPOLLIN)

    def run(self) -> None:
        """Serve; returns when the owner has closed its end."""
        self.control.send(json.dumps({"ready": True}).encode())
        spin_until = 0.0
        idle = IdleCpu()
        while True:
            spin = bool(self.replays) or (time.monotonic() < spin_until and idle.now())
            events = self.poll.poll(0 if spin else -1)
            for fd, _ in events:
                if fd == self.control.fileno():
                    if not self._command():
                        return
                    continue
                clone = self.clones.get(fd)
                if clone is None:  # it went a moment ago
                    continue
                if fd == clone.hangup or not self._guarded(clone, self.serve):
                    self._forget(clone)
                spin_until = time.monotonic() + SPIN
            if not events and self.replays:
                self._replay()

    def _command(self) -> bool:
        """Take a clone, a window or a working set from the owner; False at the end."""
        message, fds, _, _ = socket.recv_fds(self.control, 1 << 16, 3)
        if not message:
            return False
        values = json.loads(message)
        if "window" in values:
            self.window = values["window"]
            return True
        if "working_set" in values:
            self.working_set = working_set.load(Path(values["working_set"]))
            self.memory.read_ahead(self.working_set)
            self.replays += [(clone, chunks(self.working_set)) for clone in set(self.clones.values())]
            return True
        clone = Clone(
            values["number"],
            Userfaultfd(fds[0]),
            fds[1],
            fds[2],
            [Region(*region) for region in values["regions"]],
        )
        os.close(fds[2])
        self.clones[clone.uffd.fd] = self.clones[clone.hangup] = clone
        self.poll.register(clone.uffd.fd, select.EPOLLIN)
        self.poll.register(clone.hangup, select.EPOLLRDHUP)
        if values["again"]:  # the process before us may have read faults that it did not answer
            for region in clone.regions:
                clone.uffd.wake(region.address, region.size)
        elif self.working_set:
            self.replays.append((clone, chunks(self.working_set)))
        return True

    def _guarded(self, clone: Clone, work: Any) -> bool:
        """Do ``work`` for a clone; if it cannot be done the owner is told, who ends the clone."""
        try:
            work(clone)
        except Exception as error:
            try:
                failure = {"failed": clone.number, "error": str(error)}
                self.control.send(json.dumps(failure).encode())
            except OSError:
                pass
            return False
        clone.publish()
        return not clone.gone

    def _forget(self, clone: Clone) -> None:
        for fd in (clone.uffd.fd, clone.hangup):
            if self.clones.pop(fd, None) is not None:
                self.poll.unregister(fd)
        clone.gone = True
        clone.close()

    def _replay(self) -> None:
        """Bring in one chunk of the working set, for the clones in turn."""
        clone, ranges = self.replays.popleft()
        chunk = None if clone.gone else next(ranges, None)
        if chunk is None:
            return

        def bring(clone: Clone) -> None:
            first, count = chunk
            for region in clone.regions:
                start = max(first, region.offset // PAGE)
                end = min(first + count, (region.offset + region.size) // PAGE)
                if start < end:
                    clone.replayed += end - start
                    self.populate(clone, region, start, end)
            self.serve(clone)

        if self._guarded(clone, bring):
            self.replays.append((clone, ranges))
        else:
            self._forget(clone)

    def serve(self, clone: Clone) -> None:
        """Answer all faults of ``clone`` that are there."""
        self.read(clone)
        while clone.pending and not clone.gone:
            region, page = clone.locate(clone.pending.popleft())
            clone.faults += 1
            if clone.state[page] & PRESENT:
                # Another's window brought it in meanwhile. Or it was being removed while we did so, and is gone again.
                while not (clone.gone or self._fill(clone, region, page, 1)):
                    pass
            else:
                self.populate(clone, region, *self._window(region, page))

    def _window(self, region: Region, page: int) -> tuple[int, int]:
        """The pages to bring in for a fault at ``page``."""
        size = self.window
        start, limit = region.offset // PAGE, (region.offset + region.size) // PAGE
        first = page // size * size
        end = first + size
        if size > 1 and not self.memory.data[page]:  # as much of the hole as lies in the large window
            data = self.memory.data
            large = max(start, page // HOLE_WINDOW * HOLE_WINDOW)
            first = min(first, max(large, data.rfind(b"\1", large, page) + 1))
            after = data.find(b"\1", page, large + HOLE_WINDOW)
            end = max(end, after if after >= 0 else large + HOLE_WINDOW)
        return max(first, start), min(end, limit)

    def read(self, clone: Clone) -> None:
        """Take the events of ``clone``: removals at once, faults into ``pending``."""
        for event, first, second in clone.uffd.events():
            if event == EVENT_PAGEFAULT:
                clone.pending.append(second)
            elif event == EVENT_REMOVE:
                start = clone.locate(first)[1]
                count = (second - first) // PAGE
                clone.state[start : start + count] = b"\2" * count
                clone.removed += count

    def populate(self, clone: Clone, region: Region, first: int, end: int) -> None:
        """Fill those pages of ``[first, end)``, page numbers in the file, that are not there."""
        state, data = clone.state, self.memory.data
        page = first
        while page < end and not clone.gone:
            if state[page] & PRESENT:
                page += 1
                continue
            from_file = state[page] == 0 and data[page]
            stop = page + 1
            while stop < end and not state[stop] & PRESENT and (state[stop] == 0 and data[stop]) == from_file:
                stop += 1
            page += self._fill(clone, region, page, stop - page)

    def _fill(self, clone: Clone, region: Region, page: int, count: int) -> int:
        """Fill ``count`` pages that are all like the first; returns how many were done. None: states may have changed."""
        address = region.address + page * PAGE - region.offset
        try:
            if self.memory.data[page] and not clone.state[page] & REMOVED:
                done = clone.uffd.copy(address, self.memory.address + page * PAGE, count * PAGE) // PAGE
                clone.copied += done
            else:
                done = clone.uffd.zero(address, count * PAGE) // PAGE
                clone.zeroed += done
        except OSError as error:
            if error.errno == errno.EEXIST:
                clone.uffd.wake(address, PAGE)
                done = 1
            elif error.errno == errno.EAGAIN:  # memory is being removed: an event says which
                self.read(clone)
                return 0
            elif error.errno == errno.ESRCH:
                clone.gone = True
                return 0
            else:
                raise
        clone.state[page : page + done] = bytes(clone.state[page : page + done]).translate(_TO_PRESENT)
        return done


class IdleCpu:
    """Whether another thread could run at once: no more are runnable, with us, than there are CPUs."""

    def __init__(self) -> None:
        self.fd = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)
        self.cpus = len(os.sched_getaffinity(0))
        self.looked = 0.0
        self.idle = False

    def now(self) -> bool:
        moment = time.monotonic()
        if moment - self.looked > LOOK:
            self.looked = moment
            runnable = os.pread(self.fd, 128, 0).split()[3]  # "2/345": runnable and all threads (proc(5))
            self.idle = int(runnable.partition(b"/")[0]) <= self.cpus
        return self.idle


def chunks(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """``ranges`` of pages in pieces of at most CHUNK."""
    for first, count in ranges:
        for start in range(first, first + count, CHUNK):
            yield start, min(CHUNK, first + count - start)


def used(shared: mmap.mmap) -> list[tuple[int, int]]:
    """The pages that a clone has used so far: its working set if nothing was replayed."""
    return present(shared[HEADER:])


def present(states: bytes) -> list[tuple[int, int]]:
    """The pages that are there, as ranges (first, count)."""
    return [(m.start(), m.end() - m.start()) for m in re.finditer(b"[\x01\x03]+", states)]


def main(arguments: list[str]) -> None:
    """``MEMORY``: serve its pages until standard input, a SOCK_SEQPACKET socket, is closed by its other end."""
    gc.disable()  # a collection would be a pause of every clone, and nothing here makes cycles
    Server(Memory(Path(arguments[0])), socket.socket(fileno=0)).run()


if __name__ == "__main__":
    main(sys.argv[1:])
