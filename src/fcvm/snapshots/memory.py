"""The memory server: gives clones of one snapshot their memory, page by page (the uffd backend).

Firecracker connects to ``socket`` when it loads and hands over a userfaultfd. The faults are answered by a process of
their own (page_faults.py), so that nothing else that this program does delays them. If that process dies, its clones'
vCPUs would stall for ever while Firecracker's API still answers. So we, its owner, keep a duplicate of every
userfaultfd and share the states of the pages with it: a new process takes over, wakes everyone that waits, and the
clones go on without noticing. When that does not help, or a clone's memory cannot be served, the clone is ended with a
message. And when we die, the kernel ends both: the process, whose control socket closes, and the clones, which are bound to us.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import fcvm
from fc_agent.structs import Struct
from fcvm import log
from fcvm.errors import SnapshotError
from fcvm.linux import memory, sockets
from fcvm.process import spawn
from fcvm.snapshots import page_faults
from fcvm.snapshots import working_set as working_sets
from fcvm.snapshots.page_faults import COUNTERS, HEADER, PAGE, WINDOW, Region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HANDSHAKE_LIMIT = 1 << 16  # bytes
RESTARTS = 5  # within RESTART_PERIOD seconds; more than that cannot be helped
RESTART_PERIOD = 10.0


class Faults(Struct):
    """What a clone has been given so far; all but ``faults`` are numbers of 4 KiB pages.

    Attributes:
        pid: of its Firecracker.
        copied: from the memory file; ``zeroed``: that the file does not hold.
        removed: given back through the balloon.
        replayed: of the working set, brought in without being asked for.
    """

    pid: int
    faults: int
    copied: int
    zeroed: int
    removed: int
    replayed: int


_COUNTERS = ("faults", "copied", "zeroed", "removed", "replayed")


class _Clone:
    """What we keep of a clone, to hand it to another process and to know when it ends."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection  # Firecracker keeps it open as long as it lives
        self.number = connection.fileno()
        self.pid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        self.pidfd = os.pidfd_open(self.pid)
        self.uffd = -1
        self.shared = -1
        self.states: mmap.mmap | None = None
        self.regions: list[Region] = []

    def faults(self) -> Faults:
        return Faults(self.pid, *COUNTERS.unpack_from(self.states or bytes(COUNTERS.size)))

    def close(self) -> None:
        self.connection.close()
        for fd in (self.pidfd, self.uffd, self.shared):
            if fd >= 0:
                os.close(fd)
        if self.states is not None:
            self.states.close()


class MemoryServer:
    """Serves ``memory`` to every clone that connects to ``socket``, from construction until ``close``."""

    def __init__(
        self,
        memory_file: Path,
        socket_path: Path,
        *,
        working_set: Path | None = None,
        window: int = WINDOW,
        on_failure: Callable[[int, str], None] | None = None,
    ) -> None:
        """Start serving.

        Arguments:
            socket_path: where to listen; its length does not matter.
            working_set: a file of page ranges to bring in before they are asked for (working_set.py).
            window: pages brought in by a fault; 1 to see exactly which pages a clone uses.
            on_failure: told the pid of a Firecracker whose memory cannot be served, and why, before it is killed.

        Raises:
            SnapshotError: the memory file cannot be read, or the process does not start.
        """
        if working_set is not None:
            working_sets.load(working_set)
        try:
            os.close(os.open(memory_file, os.O_RDONLY | os.O_CLOEXEC))
            self.listener = sockets.listen(socket_path)
        except OSError as error:
            raise SnapshotError(f"The memory of a snapshot cannot be served: {error}.") from error
        self.listener.setblocking(False)
        self.memory = memory_file
        self.socket = socket_path
        self.working_set = working_set
        self.window = window
        self.on_failure = on_failure or (lambda pid, message: log.error(f"the clone with pid {pid} ends: {message}"))
        self.lock = threading.Lock()
        self.clones: dict[int, _Clone] = {}
        self.past = dict.fromkeys(_COUNTERS, 0)  # of clones that have ended
        self.starts: deque[float] = deque(maxlen=RESTARTS)
        self.pidfd = -1
        self.error: Exception | None = None
        self.stop_read, self.stop_write = os.pipe()
        self.started = False
        self.ready = threading.Event()  # the process has started, or it never will
        # A process is bound to the thread that starts it, and this one must be able to be started again.
        self.thread = threading.Thread(target=self._run, name="memory server")
        self.thread.start()
        self.ready.wait()
        if not self.started:
            self.close()
            raise SnapshotError(f"The memory server does not start: {self.error}.") from self.error

    @property
    def pid(self) -> int:
        """Of the process that answers the faults."""
        return self.process.pid

    def faults(self) -> list[Faults]:
        """The clones that live, and what each has been given."""
        with self.lock:
            return [clone.faults() for clone in self.clones.values() if clone.states is not None]

    def served(self) -> int:
        """All faults answered so far, those of clones that have ended too."""
        with self.lock:  # a clone that ends meanwhile goes from the one sum to the other
            return self.past["faults"] + sum(clone.faults().faults for clone in self.clones.values())

    def used(self, pid: int) -> list[tuple[int, int]]:
        """The pages that the clone has used, as ranges (first, count)."""
        states = self.states(pid)
        return [] if states is None else page_faults.used(states)

    def states(self, pid: int) -> mmap.mmap | None:
        """What is known of the clone's pages, for ``page_faults.used``, also when it has ended; None: there is no such clone."""
        with self.lock:
            for clone in self.clones.values():
                if clone.pid == pid and clone.states is not None:
                    return mmap.mmap(clone.shared, 0)
        return None

    def widen(self, window: int) -> None:
        """Bring in so many pages by a fault from now on, in all clones."""
        self.window = window  # first: a process that is just being started is told what it is
        self._send({"window": window})

    def replay(self, working_set: Path) -> None:
        """Use another working set from now on, in all clones; raises SnapshotError if it is damaged."""
        working_sets.load(working_set)
        self.working_set = working_set
        self._send({"working_set": str(working_set)})

    def close(self) -> None:
        """Stop; clones that still live are killed, for nobody would answer them."""
        if self.stop_write >= 0:
            write, self.stop_write = self.stop_write, -1
            os.close(write)
            self.thread.join()
            os.close(self.stop_read)
            self.socket.unlink(missing_ok=True)

    def __enter__(self) -> MemoryServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- everything below runs in the thread

    def _run(self) -> None:
        try:
            self._start()
            self._serve()
        except Exception as error:
            self.error = error
        finally:
            self.ready.set()
            self.listener.close()  # whoever loads now is refused at once
            for clone in list(self.clones.values()):
                self._fail(clone, f"the memory server has stopped{f': {self.error}' if self.error else ''}")
                self._forget(clone)
            self._stop()

    def _start(self) -> None:
        """Start the process that answers faults, and hand it the clones that there are."""
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = spawn(
                [sys.executable, "-P", "-m", "fcvm.snapshots.page_faults", self.memory],
                stdin=theirs.fileno(),
                stderr=None,
                env={"PYTHONPATH": str(Path(fcvm.__file__).parent.parent)},
            )
        self.pidfd = os.pidfd_open(self.process.pid)
        self.starts.append(time.monotonic())
        self._send({"window": self.window})
        if self.working_set is not None:
            self._send({"working_set": str(self.working_set)})

    def _stop(self) -> None:
        if self.pidfd < 0:
            return
        self.control.close()
        self.process.kill()
        self.process.wait()
        os.close(self.pidfd)
        self.pidfd = -1

    def _restart(self) -> None:
        """The process has died: another one carries on."""
        self._stop()
        if not self.started:
            raise SnapshotError("its process ended at once")
        if len(self.starts) == RESTARTS and time.monotonic() - self.starts[0] < RESTART_PERIOD:
            raise SnapshotError(f"its process died {RESTARTS} times within {RESTART_PERIOD:g} seconds")
        log.warning(f"the page-fault process of {self.memory.parent.name} died; another one carries on")
        self._start()
        for clone in self.clones.values():
            if clone.uffd >= 0:
                self._hand_over(clone, again=True)

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        poll.register(self.stop_read, select.POLLIN)
        while True:
            poll.register(self.control, select.POLLIN)
            poll.register(self.pidfd, select.POLLIN)
            while not self._died(poll):
                if self.stop_write < 0:
                    return
            poll.unregister(self.control)
            poll.unregister(self.pidfd)
            self._restart()

    def _died(self, poll: select.poll) -> bool:
        """Handle what has happened; whether the process has died."""
        died = False
        for fd, _ in poll.poll():
            if fd == self.listener.fileno():
                self._accept(poll)
            elif fd == self.control.fileno():
                died |= not self._report()
            elif fd == self.pidfd:
                died = True
            elif fd in self.clones:
                clone = self.clones[fd]
                if clone.uffd < 0 and self._handshake(clone):
                    poll.modify(fd, select.POLLRDHUP)
                else:
                    poll.unregister(fd)
                    self._forget(clone)
        return died

    def _accept(self, poll: select.poll) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # no descriptors left: Firecracker sees a hang-up and its load fails
                log.error(f"a clone cannot be served: {error}")
                return
            connection.setblocking(False)
            try:
                clone = _Clone(connection)
            except OSError as error:  # it was killed meanwhile, or no descriptors are left
                connection.close()
                log.error(f"a clone cannot be served: {error}")
                continue
            with self.lock:
                self.clones[connection.fileno()] = clone
            poll.register(connection, select.POLLIN)

    def _handshake(self, clone: _Clone) -> bool:
        """Read what Firecracker says: a JSON list of its regions, with the userfaultfd; False if it said something else."""
        fds: list[int] = []
        try:
            message, fds, _, _ = socket.recv_fds(clone.connection, HANDSHAKE_LIMIT, 1)
            if not message:
                return False
            clone.regions = page_faults.regions(json.loads(message))
            clone.shared = memory.shared(HEADER + self.memory.stat().st_size // PAGE, "fcvm-pages")
            with self.lock:
                clone.uffd = fds.pop()
                clone.states = mmap.mmap(clone.shared, 0)
        except BlockingIOError:
            return True
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            self._fail(clone, f"it asked for memory in an unknown way: {error}")
            return False
        finally:
            for fd in fds:
                os.close(fd)
        self._hand_over(clone, again=False)
        return True

    def _hand_over(self, clone: _Clone, *, again: bool) -> None:
        regions = [(r.address, r.size, r.offset) for r in clone.regions]
        values = {"number": clone.number, "regions": regions, "again": again}
        self._send(values, [clone.uffd, clone.number, clone.shared])

    def _send(self, values: dict[str, Any], fds: Sequence[int] = ()) -> None:
        with contextlib.suppress(OSError):  # it has died: its successor will be told again
            socket.send_fds(self.control, [json.dumps(values).encode()], fds)

    def _report(self) -> bool:
        """Read what the process says: that it serves, or cannot serve a clone; False when it has died."""
        try:
            message = self.control.recv(HANDSHAKE_LIMIT)
        except ConnectionResetError:
            return False
        if not message:
            return False
        values = json.loads(message)
        if "ready" in values:
            self.started = True
            self.ready.set()
        elif values["failed"] in self.clones:
            self._fail(self.clones[values["failed"]], values["error"])
        return True

    def _fail(self, clone: _Clone, message: str) -> None:
        """End a clone that would hang; its own hang-up removes it from the list."""
        self.on_failure(clone.pid, message)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(clone.pidfd, signal.SIGKILL)

    def _forget(self, clone: _Clone) -> None:
        with self.lock:
            del self.clones[clone.number]
            ended = clone.faults()
            for name in _COUNTERS:
                self.past[name] += getattr(ended, name)
            clone.close()
