"""Where a machine keeps its files, and what it says about itself.

Lasting files are in ``<base_dir>/machine``, sockets in a directory of the runtime directory that belongs to this base
directory, so that two base directories have two machines. The keeper (``keeper.py``) holds an flock on ``lock`` for its
whole life: whether a machine runs is asked of the kernel. ``state.json`` tells the rest; it is replaced, never edited.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import time
from pathlib import Path

from fc_agent.structs import Struct, asdict, fields
from fcvm import config as settings
from fcvm.errors import HostError
from fcvm.storage import records

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Phase = Literal["stopped", "starting", "running", "stopping", "broken"]


class Places(Struct):
    """The files of the machine of the data directory ``base``; sockets are in ``runtime``."""

    base: Path
    runtime: Path

    @classmethod
    def of(cls, base: Path) -> Places:
        name = hashlib.sha256(os.fsencode(base.resolve())).hexdigest()[:8]
        return cls(base, Path(settings.default_runtime_dir(), f"machine-{name}"))

    @property
    def directory(self) -> Path:
        return self.base / "machine"

    @property
    def disk(self) -> Path:
        return self.directory / "disk.img"

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    @property
    def log(self) -> Path:
        return self.directory / "keeper.log"

    def keep_previous(self) -> None:
        """Keep what the machine before this one wrote, as ``NAME.1``: why it ended can still be read."""
        for path in (self.console, self.log):
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, previous(path))

    @property
    def state(self) -> Path:
        return self.directory / "state.json"

    @property
    def lock(self) -> Path:
        """Held by the keeper while it lives."""
        return self.directory / "lock"

    @property
    def starting(self) -> Path:
        """Held from the command that starts a keeper until that is ready, so that others wait."""
        return self.directory / "starting"

    @property
    def session(self) -> Path:
        """The way to the machine's session server."""
        return self.runtime / "session.sock"

    @property
    def oem(self) -> Path:
        """What the machine is told at its start."""
        return self.runtime / "oem"

    def make(self) -> None:
        """Make both directories, for their owner alone.

        Raises:
            HostError: somebody else owns the directory for sockets, or the user may not write.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.directory.chmod(0o700)
            for directory in (self.runtime.parent, self.runtime):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise HostError(f"{error.filename} cannot be made: {error.strerror}.") from error
        for directory in (self.runtime.parent, self.runtime):
            found = os.lstat(directory)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.geteuid(), 0):
                raise HostError(
                    f"{directory} belongs to somebody else, so the machine's sockets would not be safe in it.",
                    hint="set XDG_RUNTIME_DIR to a directory of your own",
                )


def previous(path: Path) -> Path:
    """Where the file ``path`` of the run before this one is kept."""
    return path.with_name(f"{path.name}.1")


class State(Struct):
    """What the machine is doing. Memory in MiB, ``disk`` in MiB, ``since`` in seconds of the epoch.

    Attributes:
        detail: within ``phase``, what it is at: ``"booting"``, ``"copying files"``...
        pid: of the keeper; QEMU is its child ``qemu_pid``.
        boot: what it was started from and with; see ``machine.boot_key``.
        error, hint: why it is broken, and what helps.
    """

    phase: Phase = "stopped"
    detail: str = ""
    pid: int = 0
    qemu_pid: int = 0
    since: float = 0.0
    cpus: int = 0
    memory: int = 0
    disk: int = 0
    boot: str = ""
    error: str = ""
    hint: str = ""


def read(places: Places) -> State:
    """The machine's state, true now: that of a keeper that is gone shows as stopped, or broken if it said so."""
    try:
        values = records.load(places.state)
        state = records.checked(State, {name: values[name] for name in fields(State) if name in values})
    except (OSError, ValueError):
        state = State()
    if alive(places):
        return state
    phase: Phase = "broken" if state.error else "stopped"
    return State(phase, error=state.error, hint=state.hint, since=state.since)


def write(places: Places, state: State) -> None:
    """Replace ``state.json``."""
    temporary = places.state.with_suffix(".creating")
    temporary.write_text(json.dumps(asdict(state)))
    os.replace(temporary, places.state)


def alive(places: Places) -> bool:
    """Whether a keeper holds the lock."""
    try:
        fd = os.open(places.lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def uptime(state: State) -> float:
    """Seconds since the machine was started; 0 when it is not running."""
    return time.time() - state.since if state.phase in ("starting", "running", "stopping") else 0.0
