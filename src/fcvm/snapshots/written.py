"""Pages that a restored VM writes while it starts: made its own before it runs, where faults are dear.

With the file backend a page belongs to the snapshot's file until the guest writes to it. That is a fault; often it is the second,
because the page was read before, and then KVM faults once more, as the kernel has changed the mapping under it. Under emulation that is a
quarter of `podman run` from a boot snapshot: 2.7 s to the first output, 2.0 with this (0.3 of them spent here, for 8500 pages).
With KVM a fault costs a hundredth, and pages are copied that may not be needed, so there it is not done.

Which pages those are is recorded from the first VM that was restored. They are made its own by writing to them what they hold, through
/proc/PID/mem (proc(5)): for the guest nothing changes, whatever the record says. Some hold something newer than the file, as Firecracker
writes to a VM that does not run yet: VMGenID's number while it loads, packets as they arrive. So it is stopped meanwhile, and a page that is
not the file's any more is left alone.
"""

import contextlib
import os
import signal
from array import array
from collections.abc import Iterator
from pathlib import Path

from fcvm import log
from fcvm.errors import FcvmError
from fcvm.firecracker.process import Firecracker
from fcvm.snapshots import store, working_set
from fcvm.snapshots.store import Snapshot

PAGE = os.sysconf("SC_PAGESIZE")
MOST = 64 << 20  # bytes that are made a VM's own
PIECE = 4096  # pages whose state is looked at together
PRESENT, SWAPPED, OF_FILE = 1 << 63, 1 << 62, 1 << 61  # Documentation/admin-guide/mm/pagemap.rst

Mapping = tuple[int, int, int]  # first address, first page in the file, pages


def record(pid: int, snapshot: Snapshot) -> None:
    """Note what the VM of Firecracker ``pid`` has written since it was restored; what cannot be noted is not."""
    try:
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
            ranges = [(page, 1) for mapping in _mappings(pid, snapshot.memory) for page in _own(pagemap.fileno(), mapping)]
        working_set.save(snapshot, ranges, name=store.WRITTEN, gap=1)
    except (OSError, FcvmError) as error:
        log.debug(f"what {snapshot.tag} writes is not recorded: {error}")


def give(vmm: Firecracker, snapshot: Snapshot) -> None:
    """Make these pages the VM's own that ``vmm`` has loaded and that does not run yet. Where that fails, faults do it."""
    try:
        ranges = working_set.load(snapshot.path / store.WRITTEN)
        if ranges:
            with _stopped(vmm):
                _give(vmm.pid, snapshot, ranges)
    except (OSError, FcvmError) as error:
        log.debug(f"{snapshot.tag}: pages are written by faults: {error}")


@contextlib.contextmanager
def _stopped(vmm: Firecracker) -> Iterator[None]:
    """None of its threads runs."""
    signal.pidfd_send_signal(vmm.pidfd, signal.SIGSTOP)
    try:
        os.waitid(os.P_PIDFD, vmm.pidfd, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        yield
    finally:
        signal.pidfd_send_signal(vmm.pidfd, signal.SIGCONT)


def _give(pid: int, snapshot: Snapshot, ranges: list[tuple[int, int]]) -> None:
    left = MOST // PAGE
    with (
        open(snapshot.memory, "rb", buffering=0) as source,
        open(f"/proc/{pid}/mem", "wb", buffering=0) as target,
        open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap,
    ):
        for address, start, pages in _mappings(pid, snapshot.memory):
            for first, count in ranges:
                begin, end = max(first, start), min(first + count, start + pages, max(first, start) + left)
                at = address - start * PAGE
                for stop in (*_own(pagemap.fileno(), (at + begin * PAGE, begin, end - begin)), end):
                    if begin < stop:
                        data = os.pread(source.fileno(), (stop - begin) * PAGE, begin * PAGE)
                        left -= os.pwrite(target.fileno(), data, at + begin * PAGE) // PAGE
                    begin = stop + 1


def _mappings(pid: int, memory: Path) -> list[Mapping]:
    """Where Firecracker has the guest's memory: private mappings of the snapshot's file (proc_pid_maps(5))."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").splitlines():
        addresses, mode, offset, _, _, *path = line.split(None, 5)
        if path == [str(memory)] and mode == "rw-p":
            begin, end = (int(address, 16) for address in addresses.split("-"))
            found.append((begin, int(offset, 16) // PAGE, (end - begin) // PAGE))
    return found


def _own(pagemap: int, mapping: Mapping) -> Iterator[int]:
    """The pages of a mapping, numbered as in the file, that are not the file's any more."""
    address, start, pages = mapping
    for position in range(0, pages, PIECE):
        states = os.pread(pagemap, min(PIECE, pages - position) * 8, (address // PAGE + position) * 8)
        if states.count(0) < len(states):
            for page, state in enumerate(array("Q", states), start + position):
                if state & (PRESENT | SWAPPED) and not state & OF_FILE:
                    yield page
