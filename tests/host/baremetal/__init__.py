"""A bare-metal guest for tests and measurements against a real Firecracker: see guest.c for what it does.

It runs wherever /dev/kvm opens, also where a stock kernel cannot, and boots in milliseconds.
"""

import contextlib
import hashlib
import os
import re
import socket
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fcvm import config
from fcvm.firecracker import boot
from fcvm.firecracker.process import VSOCK, Firecracker
from fcvm.linux import inotify, sockets
from fcvm.process import run
from fcvm.setup import assets
from fcvm.snapshots import create, restore, store
from fcvm.snapshots.manifest import Manifest, this_host
from fcvm.snapshots.store import Snapshot
from fcvm.storage.layout import Layout
from fcvm.storage.publish import publish

SOURCES = Path(__file__).parent
CFLAGS = [
    *("-O2", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-no-pie"),
    *("-mno-red-zone", "-mgeneral-regs-only", "-fno-stack-protector"),
    *("-Wl,--build-id=none", "-Wl,--no-warn-rwx-segments"),
]

PAGE = 4096
FIRST = (32 << 20) // PAGE  # the first page that the guest itself does not use
ABOVE_GAP = (4 << 30) // PAGE  # the first page above the hole for devices, where memory beyond 3 GiB goes on
PORT = 52

ECHO, FILL, CHECK, BALLOON, COUNTER, ON_RESET, HALT, ZEROED = range(8)
CONTINUE, STOP, STOP_AFTER_REQUEST, ACT_AGENT = range(4)


def firecracker() -> Path:
    """The Firecracker binary that ``fcvm setup`` installed; skips the test where there is none or no KVM."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm")
    if os.environ.get("FCVM_FIRECRACKER"):
        return Path(os.environ["FCVM_FIRECRACKER"])
    settings = config.load()
    _, found = assets.firecracker_of(settings, Layout(settings.base_dir))
    if found is None:
        pytest.skip("needs Firecracker: fcvm setup")
    return Path(found.path)


def kernel() -> Path:
    """The guest, compiled once per version of its sources."""
    key = hashlib.sha256(b"".join((SOURCES / n).read_bytes() for n in ("guest.c", "guest.ld")) + repr(CFLAGS).encode())
    elf = Path(tempfile.gettempdir()) / f"fcvm-baremetal-{os.getuid()}" / f"{key.hexdigest()[:16]}.elf"
    if not elf.exists():
        elf.parent.mkdir(mode=0o700, exist_ok=True)
        with publish(elf) as temporary:
            if not elf.exists():
                run(["gcc", *CFLAGS, "-T", SOURCES / "guest.ld", "-o", temporary, SOURCES / "guest.c"])
    return elf


def hardware(memory: int = 64, *, dirty_tracking: bool = True) -> boot.Hardware:
    """One CPU, ``memory`` MiB, no network."""
    return boot.Hardware(cpu=1, memory=memory, boot_args="quiet", tap=None, mac=None, dirty_tracking=dirty_tracking)


def furnish(directory: Path) -> None:
    """Put the files of a VM into ``directory``: the guest as kernel, and small disks that it never reads."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / boot.KERNEL).symlink_to(kernel())
    for name in (boot.INITRD, boot.ROOT_DISK, boot.SCRATCH_DISK, boot.IMAGE_DISK):
        (directory / name).write_bytes(name.encode().ljust(4096, b"\0"))


@contextlib.contextmanager
def booted(
    directory: Path, *, memory: int = 64, name: str = "test", dirty_tracking: bool = True
) -> Iterator[Firecracker]:
    """A guest that has booted in ``directory``, made for it."""
    furnish(directory)
    with Firecracker(firecracker(), directory, name) as vmm:
        boot.configure(vmm.api, hardware(memory, dirty_tracking=dirty_tracking))
        boot.start(vmm.api)
        wait_console(vmm, b"READY\n")  # it prints byte by byte
        yield vmm


def wait_console(vmm: Firecracker, text: bytes, *, timeout: float = 60) -> None:
    """Wait until the guest's console shows ``text``."""
    with inotify.Watch(vmm.console.file.path, inotify.IN_MODIFY) as changes:
        while text not in without_log(vmm.console.tail):
            more = changes.wait(timeout=timeout, unless=vmm.pidfd)
            assert more or text in without_log(vmm.console.tail), vmm.console.lines()


def without_log(console: bytes) -> bytes:
    """What the guest has printed: Firecracker's own log may come in between, even within a line."""
    return re.sub(rb"\d{4}-\d\d-\d\dT[^\n]*\n", b"", console)


class Guest:
    """A connection to the guest of the VM in ``directory``; use it as a context manager."""

    def __init__(self, directory: Path, *, timeout: float = 60) -> None:
        self.socket = connect(directory, timeout=timeout)

    def call(
        self,
        op: int,
        *,
        first: int = 0,
        count: int = 0,
        seed: int = 0,
        order: tuple[int, int, int] = (0, 0, 0),
        argument: int = 0,
    ) -> int:
        """One request; ConnectionError when the VM is gone, TimeoutError when it hangs."""
        self.send(op, first=first, count=count, seed=seed, order=order, argument=argument)
        return self.receive()

    def send(
        self,
        op: int,
        *,
        first: int = 0,
        count: int = 0,
        seed: int = 0,
        order: tuple[int, int, int] = (0, 0, 0),
        argument: int = 0,
    ) -> None:
        self.socket.sendall(struct.pack("<8Q", op, first, count, seed, *order, argument))

    def receive(self) -> int:
        data = self.socket.recv(8, socket.MSG_WAITALL)
        if len(data) != 8:
            raise ConnectionResetError("the guest closed the connection")
        return int(struct.unpack("<Q", data)[0])

    def echo(self, value: int) -> int:
        return self.call(ECHO, argument=value)

    def fill(self, first: int, count: int, seed: int) -> None:
        """Write the pattern of ``seed`` to ``count`` pages."""
        assert self.call(FILL, first=first, count=count, seed=seed) == count

    def wrong(self, first: int, count: int, seed: int) -> int:
        """How many of ``count`` pages do not hold the pattern of ``seed``."""
        return self.call(CHECK, first=first, count=count, seed=seed)

    def not_zero(self, first: int, count: int) -> int:
        """How many of ``count`` pages are not zero."""
        return self.call(ZEROED, first=first, count=count)

    def balloon(self, first: int, count: int) -> None:
        """Give ``count`` pages to the balloon."""
        assert self.call(BALLOON, first=first, count=count) == count

    def on_reset(self, what: int) -> None:
        """Set what the guest does once a snapshot was taken or loaded: CONTINUE, STOP, STOP_AFTER_REQUEST, ACT_AGENT."""
        self.call(ON_RESET, argument=what)

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(directory: Path, *, timeout: float = 60) -> socket.socket:
    """A vsock connection to the guest's port, established.

    Firecracker gives the guest two seconds to accept; on a busy host it may need more, so this tries until ``timeout``.
    """
    deadline = time.monotonic() + timeout
    while True:
        connection = sockets.connect(directory / VSOCK, timeout=timeout)
        try:
            connection.sendall(b"CONNECT %d\n" % PORT)
            line = b""
            while more := connection.recv(1):
                line += more
                if more == b"\n":
                    return connection
        except BaseException:
            connection.close()
            raise
        connection.close()
        if time.monotonic() > deadline:
            raise ConnectionResetError("the guest refused the connection")


def pattern(page: int, seed: int) -> tuple[int, int]:
    """The first and the last word of ``page`` after ``fill``, as guest.c computes them."""
    word = ((page * 2 + 1) * 0x9E3779B97F4A7C15 ^ seed) & (1 << 64) - 1
    return word, word ^ (1 << 64) - 1


def wrong_in_file(memory: Path, first: int, count: int, seed: int) -> int:
    """How many of ``count`` pages of a memory file (of a VM below 3 GiB) do not hold the pattern."""
    bad = 0
    with open(memory, "rb") as file:
        for page in range(first, first + count):
            file.seek(page * PAGE)
            data = file.read(PAGE)
            bad += struct.unpack("<Q", data[:8]) + struct.unpack("<Q", data[-8:]) != pattern(page, seed)
    return bad


def manifest(vmm: Firecracker, memory: int = 64) -> Manifest:
    """That of a snapshot of a bare-metal guest; it names no shared disks."""
    return Manifest(
        hardware=hardware(memory),
        disks={},
        firecracker=vmm.api.get("/version")["firecracker_version"],
        host=this_host(),
        created_at=time.time(),
    )


def snapshot(layout: Layout, tag: str, vmm: Firecracker) -> Snapshot:
    """Take a snapshot of a guest made by ``booted``, and publish it."""
    create.take(layout, tag, vmm, manifest(vmm))
    return store.find(layout, tag)


def furnish_clone(directory: Path, of: Snapshot, *, memory_socket: Path | None = None) -> None:
    """Put the files of a clone of a bare-metal guest into ``directory``."""
    directory.mkdir(parents=True)
    for name in (boot.ROOT_DISK, boot.IMAGE_DISK):
        (directory / name).write_bytes(name.encode().ljust(4096, b"\0"))
    restore.furnish(directory, of, {}, memory_socket=memory_socket)


@contextlib.contextmanager
def clone(
    directory: Path,
    of: Snapshot,
    *,
    backend: "restore.Backend" = "file",
    memory_socket: Path | None = None,
    resume: bool = True,
    dirty_tracking: bool = True,
) -> Iterator[Firecracker]:
    """A restored guest in ``directory``, made for it."""
    furnish_clone(directory, of, memory_socket=memory_socket)
    with Firecracker(firecracker(), directory, "clone") as vmm:
        restore.load(vmm, of, backend=backend, resume=resume, dirty_tracking=dirty_tracking)
        yield vmm


def children(pid: int | None = None) -> list[int]:
    """The child processes of a process (ours by default), those of all its threads."""
    found = []
    for task in Path(f"/proc/{pid or 'self'}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found += [int(child) for child in (task / "children").read_text().split()]
    return found
