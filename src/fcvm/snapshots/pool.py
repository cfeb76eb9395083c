"""Loaded, paused clones of one snapshot, ready to be taken: then a clone is one ``PATCH /vm``.

A thread keeps as many ready as were taken lately, within limits: someone who starts five clones in a row finds five
the next time, and what is not asked for any more is given back. Each has its own Firecracker, directory, disk and network
namespace already. Refilling waits until the clones that were just taken have had a moment to start, except when somebody
waits for one.

The kernel ends every clone, taken or not, with our process.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from fc_agent.structs import Struct, field, replace
from fcvm import host
from fcvm.errors import FcvmError, SnapshotError
from fcvm.firecracker.process import Firecracker
from fcvm.linux.namespaces import Namespace
from fcvm.snapshots import restore
from fcvm.snapshots.store import Snapshot
from fcvm.storage.layout import remove
from fcvm.vm.paths import POOL
from fcvm.vm.state import hold, new_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from fcvm.snapshots.restore import Backend

    class Network(Protocol):
        """What a clone needs of its network."""

        @property
        def namespace(self) -> Namespace: ...

    NetworkFactory = Callable[[str, Path], AbstractContextManager[Any]]

BATCH = 8  # clones that are loaded at the same time: most of a load is one sleeping ioctl
MEMORY = 10.0  # seconds for which a clone that was taken counts as demand
QUIET = 0.05  # seconds after the last one was taken until the pool is refilled; and for each that was taken with it
EACH = 0.02  # more: that a clone needs a CPU for to run on, take its identity and answer for the first time
BURST = 1.0  # seconds in which clones that are taken count as one burst
SLOWER = 20  # times, all of this under emulation
PATIENCE = 120.0  # seconds to wait for a clone; it takes milliseconds natively, seconds under emulation


class Kit(Struct):
    """What clones are made of.

    Attributes:
        firecracker: the binary; ``arguments``: more words for its command line.
        disks: the shared read-only ones, by name in a VM's directory.
        memory_socket: of the memory server, for the uffd backend.
        network: makes a clone's network from its id and directory; None: none.
    """

    snapshot: Snapshot
    firecracker: Path
    disks: dict[str, Path] = field(default_factory=dict)
    backend: Backend = "file"
    memory_socket: Path | None = None
    dirty_tracking: bool = True
    network: NetworkFactory | None = None
    arguments: tuple[str, ...] = ()


class Loaded:
    """A clone that stands still until ``resume``; whoever took it closes it.

    Attributes:
        id: its VM id.
        network: what the kit's factory made; None without one.
    """

    def __init__(
        self, kit: Kit, clone_id: str, directory: Path, *, on_resumed: Callable[[], None] = lambda: None
    ) -> None:
        """Start its Firecracker and send the load, without waiting for it: ``wait`` does.

        Arguments:
            on_resumed: called once it runs.
        """
        self.kit = kit
        self.on_resumed = on_resumed
        self.id = clone_id
        self.directory = directory
        self.network: Any = None
        self._place = directory  # in the pool's own
        self._undo = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            directory.mkdir(mode=0o700)
            undo.callback(self._remove)
            restore.furnish(directory, kit.snapshot, kit.disks, memory_socket=kit.memory_socket)
            namespace = None
            if kit.network is not None:
                self.network = undo.enter_context(kit.network(clone_id, directory))
                namespace = self.network.namespace
            self.firecracker = undo.enter_context(
                Firecracker(kit.firecracker, directory, clone_id, namespace=namespace, arguments=kit.arguments)
            )
            restore.send_load(self.firecracker, kit.snapshot, backend=kit.backend, dirty_tracking=kit.dirty_tracking)
            self._undo = undo.pop_all()

    def wait(self) -> None:
        """Wait until it is loaded; raises SnapshotError, and is closed then."""
        try:
            restore.receive_load(self.firecracker, self.kit.snapshot)
        except BaseException:
            self.close()
            raise

    def resume(self) -> None:
        """Let it run."""
        restore.resume(self.firecracker.api)
        self.on_resumed()

    def move(self, directory: Path) -> None:
        """Make ``directory``, which exists and is empty, its directory; from now on it is the caller's to remove.

        The path that it had stays as a symbolic link until the end, for those who have noted it.
        """
        self.directory = directory
        self._place.rename(directory)
        self._place.symlink_to(directory)
        self.firecracker.directory = directory

    def _remove(self) -> None:
        remove(self._place)

    def close(self) -> None:
        """End it, and remove its network and directory; safe to call again."""
        self._undo.close()
        self.on_resumed()  # it may never have been

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Status(Struct):
    """A pool at a moment: clones ``ready``, how many it wants to have, and how many were taken (``late``: waited for)."""

    ready: int
    target: int
    taken: int
    late: int


class Pool:
    """Keeps clones ready from construction until ``close``, which must come after the end of those that were taken."""

    def __init__(self, kit: Kit, parent: Path, *, minimum: int = 1, maximum: int = 16) -> None:
        """Start filling.

        Arguments:
            parent: where the pool makes its directory; on the file system of the snapshot, so that disks are reflinks.
            minimum, maximum: limits of the number that is kept ready; at least one clone is made even if both are 0.
        """
        self.kit = kit
        self.minimum = minimum
        self.maximum = max(minimum, maximum)
        self.directory, self._lock = _make_held(parent)
        self._changed = threading.Condition()
        self._ready: deque[Loaded] = deque()
        self._taken: deque[float] = deque()  # when, for MEMORY seconds
        self._totals = [0, 0]  # taken, late
        self._waiting = 0
        self._error: FcvmError | None = None
        self._checked = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="pool")
        self._thread.start()

    # ---- for everyone

    def take(self) -> Loaded:
        """A clone, at once if one is ready, else as soon as one is made.

        Raises:
            SnapshotError (or what else stands in the way): none can be made.
        """
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            self._error = None
            self._waiting += 1
            self._totals[1] += self._waiting > len(self._ready)
            try:
                while True:
                    while self._ready:
                        clone = self._ready.popleft()
                        if not clone.firecracker.ended():
                            self._taken.append(time.monotonic())
                            self._totals[0] += 1
                            return clone
                        clone.close()  # it was killed by someone while it waited
                    self._await(deadline)
            finally:
                self._waiting -= 1

    def make(self, network: NetworkFactory) -> Loaded:
        """A clone with another network than the kit's, loaded now; raises what stands in the way."""
        clone_id = new_id()
        clone = Loaded(replace(self.kit, network=network), clone_id, self.directory / clone_id)
        clone.wait()
        return clone

    def _await(self, deadline: float) -> None:
        """Wait for a change; raises what has prevented it."""
        if self._closing:
            raise SnapshotError(f"The clone server of {self.kit.snapshot.tag!r} is ending.")
        if self._error is not None:
            raise self._error
        self._changed.notify_all()
        if not self._changed.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
            raise SnapshotError(f"No clone of {self.kit.snapshot.tag!r} was ready within {PATIENCE:g} seconds.")

    def fill(self) -> None:
        """Wait until as many as the minimum are ready, or were and have been taken meanwhile; raises what stands in the way."""
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            before = self._totals[0]
            while len(self._ready) + self._totals[0] - before < self.minimum:
                self._await(deadline)

    def _refill(self) -> None:
        """Wake the thread. Not before a taken clone was resumed: it would compete with us for the interpreter."""
        with self._changed:
            self._changed.notify_all()

    def status(self) -> Status:
        with self._changed:
            return Status(len(self._ready), self._target(), *self._totals)

    def close(self) -> None:
        """End the clones that wait and remove the pool's directory; safe to call again."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        remove(self.directory)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the thread

    def _target(self) -> int:
        """How many shall be ready: as many as were taken in the last MEMORY seconds, within the limits."""
        horizon = time.monotonic() - MEMORY
        while self._taken and self._taken[0] < horizon:
            self._taken.popleft()
        return max(self.minimum, min(self.maximum, len(self._taken)))

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    missing, surplus = self._next()
                    if self._closing:
                        return
                for clone in surplus:
                    clone.close()
                try:
                    self._make(missing)
                except FcvmError as error:
                    self._fail(error)
                except Exception as error:
                    self._fail(SnapshotError(f"No clone of {self.kit.snapshot.tag!r} can be made: {error}."))
        finally:
            self._closing = True
            while self._ready:
                self._ready.popleft().close()

    def _fail(self, error: FcvmError) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _next(self) -> tuple[int, list[Loaded]]:
        """Wait until there is something to do: how many to make, and those to give back."""
        while not self._closing:
            wanted = self._waiting if self._waiting else self._target()
            ready = len(self._ready)
            quiet_in = self._quiet_until() - time.monotonic()
            if ready > wanted and not self._waiting:
                return 0, [self._ready.pop() for _ in range(ready - wanted)]
            if ready < wanted and self._error is None:
                if self._waiting or quiet_in <= 0:
                    return min(BATCH, wanted - ready), []
                self._changed.wait(quiet_in)
            elif self._taken:
                self._changed.wait(MEMORY - (time.monotonic() - self._taken[0]) + 0.01)  # the target may fall then
            else:
                self._changed.wait()
        return 0, []

    def _quiet_until(self) -> float:
        """The monotonic time before which refilling would compete with clones that have just been taken."""
        if not self._taken:
            return 0.0
        last = self._taken[-1]
        burst = sum(1 for when in self._taken if when > last - BURST)
        return last + (QUIET + EACH * burst) * (SLOWER if host.emulated() else 1)

    def _make(self, count: int) -> None:
        """Load ``count`` clones, all at the same time."""
        loading: list[Loaded] = []
        try:
            for _ in range(count):
                clone_id = new_id()
                directory = self.directory / clone_id
                loading.append(Loaded(self.kit, clone_id, directory, on_resumed=self._refill))
            while loading:
                clone = loading.pop(0)
                clone.wait()
                with self._changed:
                    self._ready.append(clone)
                    self._changed.notify_all()
        finally:
            for clone in loading:
                clone.close()


def _make_held(parent: Path) -> tuple[Path, int]:
    """A new pool's directory, and the lock on it; made again if somebody sweeps it away before it is locked."""
    while True:
        path = parent / f"{POOL}{os.urandom(6).hex()}"
        path.mkdir(mode=0o700)
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            lock = hold(path)
            if path.exists():
                return path, lock
            os.close(lock)
