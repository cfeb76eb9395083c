"""What is known of each VM: one JSON file, replaced atomically, a lock that tells whether it lives, and a link by its name.

The supervisor holds an flock on ``state/<id>.lock`` for its whole life, so "is it alive" is a question to the kernel,
not to a process number that may have been reused. A VM whose lock is free while its record says that it runs has
crashed; ``sweep`` removes what it left.

``state/<name>.name`` links to the id, so that to find one VM of 500, or to enter one more, is to look at one file and not at 500 (23 ms).
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

from fc_agent.jsontext import dumps
from fc_agent.structs import Struct, asdict, field, fields, replace
from fcvm import log
from fcvm.errors import ConflictError, NotFoundError, UsageError
from fcvm.storage import records as records_on_disk
from fcvm.storage.layout import Layout, is_held, locked, remove, wait_until_free
from fcvm.vm.paths import POOL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

SCHEMA = 1
ID_LENGTH = 12  # hexadecimal digits
HEALTH = ("starting", "healthy", "unhealthy", "stopped")
NAME = r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}"  # Podman's rule, within a host name's length


class Record(Struct):
    """One VM as `fcvm ls --json` shows it; docs/json.md describes each field.

    Attributes:
        pid: of the supervisor, the process that the VM's life is bound to; where the VMs are.
        status: ``starting``, ``running``, ``stopping``, ``exited``.
        health: one of ``HEALTH``.
        created_at: seconds since the epoch.
        keep: the record stays after the end (--no-rm).
    """

    id: str
    name: str
    pid: int
    status: str
    health: str
    image: str
    created_at: float
    cpu: int
    memory_mib: int
    exit_code: int | None = None
    snapshot: str | None = None
    network: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    volumes: list[dict[str, Any]] = field(default_factory=list)
    keep: bool = False
    schema: int = SCHEMA

    @property
    def is_kept(self) -> bool:
        """Whether it has ended as it should, and stays for the user to remove."""
        return self.status == "exited" and self.keep

    def public(self) -> dict[str, Any]:
        """The record as JSON for users."""
        values = asdict(self)
        del values["keep"]
        values["created_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.created_at))
        return values


def check_name(name: str) -> str:
    """``name`` if it can name a VM; raises UsageError."""
    import re

    if not re.fullmatch(NAME, name):
        raise UsageError(
            f"{name!r} cannot name a VM.",
            hint="use letters, digits, '_', '.' and '-', beginning with a letter or digit, at most 63",
        )
    return name


class Registration:
    """A VM's own entry: holds its lock from ``register`` until ``close``; ``update`` replaces its record."""

    def __init__(self, layout: Layout, record: Record, lock: int) -> None:
        self.layout = layout
        self.record = record
        self.lock = lock

    def update(self, **changes: Any) -> None:
        """Replace fields of the record, on disk at once; on a full disk others see the old ones, and the VM goes on."""
        self.record = replace(self.record, **changes)
        try:
            write(self.layout, self.record)
        except OSError as error:
            log.warning(f"The record of {self.record.name} cannot be written: {error.strerror}.")

    def close(self) -> None:
        """End the registration; the record goes with it unless it is kept."""
        if self.lock < 0:
            return
        if not self.record.keep:
            forget(self.layout, self.record.id)
        os.close(self.lock)
        self.lock = -1


def new_id() -> str:
    """A fresh VM id: twelve hexadecimal digits."""
    return os.urandom(6).hex()  # as secrets.token_hex, whose import costs every command 3 ms


def register(layout: Layout, record: Record) -> Registration:
    """Enter a new VM.

    Raises:
        ConflictError: its name is that of another VM.
    """
    with locked(os.path.join(layout.place("state"), ".register.lock")):
        other = _named(layout, record.name)
        if other is not None:
            alive = is_alive(layout, other.id)
            if not alive and not other.is_kept:
                _clear(layout, [other.id])
            else:
                verb = "running" if alive else "kept"
                raise ConflictError(
                    f"A VM named {record.name!r} exists already ({verb}).",
                    hint=f"fcvm {'stop' if verb == 'running' else 'rm'} {record.name}",
                )
        lock = os.open(_path(layout, record.id, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            remove(name := _path(layout, record.name, "name"))  # of a VM that is gone
            os.symlink(record.id, name)
            write(layout, record)
        except BaseException:
            forget(layout, record.id)
            os.close(lock)
            raise
    return Registration(layout, record, lock)


def write(layout: Layout, record: Record) -> None:
    """Put ``record`` on disk, replacing the one before in one step."""
    temporary = _path(layout, record.id, "tmp")
    with open(temporary, "w") as file:
        file.write(dumps(asdict(record)))
    os.replace(temporary, _path(layout, record.id, "json"))


def read(layout: Layout, vm_id: str) -> Record | None:
    """The record of ``vm_id``; None when it is gone, damaged or of another schema. A newer version may have more fields."""
    try:
        values = records_on_disk.load(_path(layout, vm_id, "json"))
        record = records_on_disk.checked(Record, {name: values[name] for name in fields(Record) if name in values})
    except (OSError, ValueError):
        return None
    sound = record.schema == SCHEMA and record.id == vm_id and records_on_disk.is_time(record.created_at)
    return record if sound and _has_sound_lists(record) else None


def _has_sound_lists(record: Record) -> bool:
    """Whether ports and volumes are what docs/json.md says, as far as `fcvm ls` relies on it."""
    ports = record.network.get("ports", [])
    return (
        isinstance(ports, list)
        and all(isinstance(port, dict) for port in ports)
        and all(
            isinstance(volume, dict) and isinstance(volume.get("guest"), str) and isinstance(volume.get("read_only"), bool)
            for volume in record.volumes
        )
    )


def records(layout: Layout) -> Iterator[Record]:
    """All VMs, the oldest first."""
    found = [record for vm_id in _ids(layout, "json") if (record := read(layout, vm_id))]
    yield from sorted(found, key=lambda record: record.created_at)


def is_alive(layout: Layout, vm_id: str) -> bool:
    """Whether its supervisor lives: asked of the kernel through the lock it holds."""
    return is_held(_path(layout, vm_id, "lock"))


def wait_for_end(layout: Layout, vm_id: str) -> None:
    """Wait until its supervisor has let go of the VM's name and of all else that it held, or has died."""
    wait_until_free(_path(layout, vm_id, "lock"))  # which it lets go of as the last thing


def find(layout: Layout, *, name: str | None = None, pid: int | None = None, alive: bool = True) -> Record:
    """The VM of that name, id (or unambiguous beginning of it) or supervisor pid.

    Raises:
        NotFoundError: there is none (or, with ``alive``, it does not run). UsageError: there are several.
    """
    what = f"with pid {pid}" if name is None else f"named {name!r}"
    found = [r for r in records(layout) if r.pid == pid] if name is None else _called(layout, name)
    if not found:
        raise NotFoundError(f"There is no VM {what}.", hint="fcvm ls --all")
    if len(found) > 1:  # clones of one client or server have its pid
        names = ", ".join(record.name for record in found[:8]) + (" ..." if len(found) > 8 else "")
        raise UsageError(f"There are {len(found)} VMs {what}: {names}.", hint="give the name of one")
    if alive and not is_alive(layout, found[0].id):
        raise NotFoundError(f"The VM {found[0].name!r} is not running.", hint="fcvm ls --all")
    return found[0]


def _called(layout: Layout, name: str) -> list[Record]:
    """The VMs of that name or id; else those whose id begins so. One that an older fcvm has entered has no link."""
    exact = [_named(layout, name), read(layout, name) if len(name) == ID_LENGTH and name.isalnum() else None]
    found = list({record.id: record for record in exact if record is not None}.values())
    return found or [
        record for record in records(layout) if record.name == name or (len(name) >= 4 and record.id.startswith(name))
    ]


def _named(layout: Layout, name: str) -> Record | None:
    """The VM that has that name."""
    try:
        record = read(layout, os.readlink(_path(layout, name, "name")))
    except OSError:
        return None
    return record if record is not None and record.name == name else None


def sweep(layout: Layout) -> list[str]:
    """Remove what VMs whose supervisor died without cleaning up have left; returns their names.

    Processes, namespaces and taps are bound to the supervisor by the kernel and are gone already; what remains is
    files, clone servers' among them, and a Firecracker that had just been started. Cheap when there is nothing to do: two directory listings. Where
    we may not write, nothing is removed.
    """
    names: list[str] = []
    try:
        with locked(os.path.join(layout.place("state"), ".register.lock")):
            _clear(layout, _crashed(layout, names))
    except OSError as error:  # read-only, another user's, or so full that no lock can be made
        if error.errno not in (errno.ENOENT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC):
            raise
    return names


def _crashed(layout: Layout, names: list[str]) -> list[str]:
    """The ids of VMs whose supervisor died without cleaning up, their ``names`` added; pools of dead servers are removed at once."""
    known = set(_ids(layout, "json"))
    crashed: list[str] = []
    for vm_id in {*known, *os.listdir(layout.place("vms")), *_ids(layout, "lock")}:
        if vm_id.startswith(POOL):
            _clear_pool(os.path.join(layout.place("vms"), vm_id))
        if vm_id.startswith(".") or is_alive(layout, vm_id):
            continue
        record = read(layout, vm_id)
        if record.is_kept if record else _is_of_another(layout, vm_id):
            continue
        crashed.append(vm_id)
        names.append(record.name if record else vm_id)
    _free_names(layout, _ids(layout, "name"), lambda owner: owner not in known)
    return crashed


def _clear(layout: Layout, vm_ids: Sequence[str]) -> None:
    """Remove what VMs have left that have crashed."""
    if not vm_ids:
        return
    from fcvm.firecracker import strays

    strays.end(layout.vms / vm_id for vm_id in vm_ids)
    for vm_id in vm_ids:
        forget(layout, vm_id)


def _is_of_another(layout: Layout, vm_id: str) -> bool:
    """Whether another version of fcvm has written the VM's record: that knows what to do with it."""
    try:
        return records_on_disk.load(_path(layout, vm_id, "json")).get("schema") != SCHEMA
    except (OSError, ValueError):
        return False


def _clear_pool(path: str) -> None:
    """Remove the directory of a clone server's pool if it was killed; its clones ended with it, but for one just being started."""
    try:
        lock = hold(path)
        try:
            from pathlib import Path

            from fcvm.firecracker import strays

            strays.end(Path(path).iterdir())
            remove(path)
        finally:
            os.close(lock)
    except OSError:  # it lives, or somebody else removes it
        pass


def hold(directory: str | os.PathLike[str]) -> int:
    """A descriptor with the lock on a pool's directory; raises BlockingIOError if somebody else has it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def forget(layout: Layout, vm_id: str) -> None:
    """Remove a dead VM's name, directory, record and lock; the name first: nobody can take it while there is the record."""
    record = read(layout, vm_id)
    _free_names(layout, _ids(layout, "name") if record is None else [record.name], lambda owner: owner == vm_id)
    remove(os.path.join(layout.place("vms"), vm_id))
    for kind in ("json", "tmp", "lock"):
        remove(_path(layout, vm_id, kind))


def _free_names(layout: Layout, names: list[str], is_gone: Callable[[str], bool]) -> None:
    """Let others have those of ``names`` that belong to a VM that is gone."""
    for name in names:
        try:
            if is_gone(os.readlink(link := _path(layout, name, "name"))):
                os.unlink(link)
        except OSError:  # nobody has it, or its VM has just ended
            pass


def _path(layout: Layout, vm_id: str, kind: str) -> str:
    return os.path.join(layout.place("state"), f"{vm_id}.{kind}")


def _ids(layout: Layout, kind: str) -> list[str]:
    """Those that have a file of this kind."""
    return [name.removesuffix(f".{kind}") for name in os.listdir(layout.place("state")) if name.endswith(f".{kind}")]
