"""A VM's volumes as its supervisor has them: sockets that the guest connects to, and the process that serves them.

The sockets are the supervisor's own, ``vsock.sock_5000`` and following in the VM's directory, so that they are there before
the guest and stay when the process ends. Then it is started again and takes over what the guest has open from its
journals, in ``volumes/``; the guest's requests wait meanwhile. One that does not get over its journals starts without them.
The process is bound to the thread here that started it, so it ends with the supervisor, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import fcvm
from fc_agent.protocol import VOLUME_PORT
from fcvm import hostpath, log
from fcvm.errors import SnapshotError
from fcvm.linux import sockets
from fcvm.process import spawn
from fcvm.storage.layout import remove
from fcvm.volumes.spec import Volume

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

JOURNALS = "volumes"
LOG = "volumes.log"
HOPELESS = 3  # ends in a row before it was ready, after which the journals are given up
SETTLED = 10.0  # seconds; one that ends sooner is not started again at once:
PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds before the second start in a row, more before each further one
SAVE_TIME = 60.0  # seconds; it takes milliseconds natively


class Volumes:
    """The volumes of one VM, served from construction until ``close``; without any there is no process."""

    def __init__(
        self, volumes: Sequence[Volume], vsock: Path, *, owner: tuple[int, int] = (0, 0), states: Path | None = None
    ) -> None:
        """
        Arguments:
            vsock: the VM's vsock device; the sockets are made beside it.
            owner: (uid, gid) as which our own files show in the guest, when we are not root.
            states: ``volumes.json`` of the snapshot that the VM is restored from.
        """
        self._volumes = volumes
        self._directory = vsock.parent
        self._owner = owner
        self._states = states
        self._changed = threading.Condition()
        self._saving = threading.Lock()
        self._closing = threading.Event()
        self._reset = False
        self._process: Any = None
        self._control: socket.socket | None = None
        self._listeners: dict[Path, socket.socket] = {}
        self._thread = threading.Thread(target=self._run, name="volumes", daemon=True)
        try:
            for index in range(len(volumes)):
                path = vsock.with_name(f"{vsock.name}_{VOLUME_PORT + index}")
                self._listeners[path] = sockets.listen(path)
        except BaseException:
            self._close_listeners()
            raise
        if volumes:
            self._thread.start()

    def save(self) -> list[dict[str, Any]]:
        """The state of each volume, for ``volumes.json``; the VM stands still.

        Raises:
            SnapshotError: the process does not answer.
        """
        if not self._volumes:
            return []
        end = time.monotonic() + SAVE_TIME
        with self._saving:
            while (left := end - time.monotonic()) > 0:
                with self._changed:
                    self._changed.wait_for(lambda: self._control is not None, left)
                    control = self._control
                if control is None:
                    break
                control.settimeout(left / 2)
                with contextlib.suppress(OSError, ValueError):
                    return _ask(control)
                with self._changed:  # it has ended, or is stuck and shall: ask the next one
                    if self._control is control and self._process is not None:
                        self._process.kill()
                    self._changed.wait_for(
                        lambda control=control: self._control is not control,  # type: ignore[misc]
                        max(0.0, end - time.monotonic()),
                    )
        raise SnapshotError("The server of the VM's volumes does not answer.", hint="try again")

    def restart(self, states: Path | None = None) -> None:
        """Forget a guest that is replaced by another one, restored or booted anew; ``states`` are what that one goes on from."""
        with self._changed:
            self._states = states
            self._reset = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """End the process; safe to call again."""
        with self._changed:
            self._closing.set()
            if self._process is not None:
                self._process.kill()
        if self._volumes:
            self._thread.join()
        self._close_listeners()

    def _close_listeners(self) -> None:
        for path, listener in self._listeners.items():
            path.unlink(missing_ok=True)
            listener.close()
        self._listeners.clear()

    # The thread

    def _run(self) -> None:
        """Start the process, again and again."""
        quick = failed = 0  # ends in a row that came soon; or even before it was ready
        while not self._closing.wait(min(PAUSE * max(0, quick - 1), LONGEST_PAUSE)):
            begun = time.monotonic()
            try:
                code, ready = self._serve()
                end = f"ended ({code})"
            except OSError as error:  # no memory, no descriptors: they may come back
                ready, end = True, f"cannot be started: {error}"
            if self._closing.is_set():
                return
            if self._reset:
                self._reset, quick, failed = False, 0, 0
                self._forget()
                continue
            quick = quick + 1 if time.monotonic() - begun < SETTLED else 0
            failed = 0 if ready else failed + 1
            log.warning(f"the server of the volumes {end}; it is started again")
            if failed == HOPELESS:
                log.warning("files that were open in volumes are lost")
                with self._changed:
                    if not self._reset:
                        self._states = None
                self._forget()

    def _serve(self) -> tuple[int, bool]:
        """Start the process, wait for its end; its exit code, and whether it was ready."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs, open(self._directory / LOG, "ab") as errors:
                process = spawn(
                    [sys.executable, "-P", "-m", "fcvm.volumes.server"],
                    stdin=theirs.fileno(),
                    stderr=errors,
                    env={"PYTHONPATH": str(Path(fcvm.__file__).parent.parent)},
                    cwd="/",
                    pass_fds=[listener.fileno() for listener in self._listeners.values()],
                )
            with self._changed:
                self._process = process
                if self._closing.is_set() or self._reset:
                    process.kill()
            ready = False
            with contextlib.suppress(OSError):  # it has ended already
                ours.sendall(json.dumps(self._job()).encode() + b"\n")
                ready = ours.recv(1) == b"\n"
            with self._changed:
                self._control = ours if ready else None
                self._changed.notify_all()
            code = process.wait()
            with self._changed:
                self._process = self._control = None
                self._changed.notify_all()
        return code, ready

    def _job(self) -> dict[str, Any]:
        volumes = [
            {
                "root": str(hostpath.resolve(volume.host)),
                "read_only": volume.read_only,
                "owner": self._owner,
                "listener": listener.fileno(),
                "journals": str(self._directory / JOURNALS / str(index)),
            }
            for index, (volume, listener) in enumerate(zip(self._volumes, self._listeners.values(), strict=True))
        ]
        return {"volumes": volumes, "states": str(self._states) if self._states is not None else None}

    def _forget(self) -> None:
        remove(self._directory / JOURNALS, ignore_errors=True)


def _ask(control: socket.socket) -> list[dict[str, Any]]:
    """The states, from the process at the other end; raises OSError, ValueError if it ends, or takes too long."""
    with control.makefile("rwb") as lines:
        lines.write(b'{"op": "save"}\n')
        lines.flush()
        states: list[dict[str, Any]] = json.loads(lines.readline())
        return states
