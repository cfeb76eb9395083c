"""A private place to build in, from which finished things are moved into the data directory in one step.

It lies in ``cache/``, on the same file system. A lock makes two builders of the same thing wait for each other; whatever
a killed one has left is removed by the next.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fcvm.errors import HostError
from fcvm.linux.files import sync
from fcvm.process import find, run
from fcvm.setup.progress import Step, size
from fcvm.storage.layout import Layout, remove
from fuse_pipe.linux import syncfs


@contextmanager
def building(layout: Layout, name: str, step: Step) -> Iterator[Path]:
    """An empty directory to build ``name`` in; ours alone until the block ends, when it is removed.

    The caller should look again whether another process has built the thing while we waited.
    """
    work = layout.cache / f"build-{name}"
    with waiting(work.with_suffix(".lock"), step):
        clear(work)
        work.mkdir()
        try:
            yield work
        finally:
            clear(work)


@contextmanager
def waiting(path: Path, step: Step) -> Iterator[None]:
    """Hold an flock on ``path``; says so when it has to wait for another process."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            step.note("waiting for another fcvm")
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def namespaces() -> list[str]:
    """The start of a command line for a program that acts as root on files in a work directory, mounts there, and forks.

    A PID namespace of its own: when we are killed, everything in it dies with its first process, and no mount is left
    over. For an ordinary user, a user namespace too, in which the user is root and the subordinate ids are everyone else.
    """
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user", "--map-auto"]
    unshare = find("unshare", package="util-linux")
    return [unshare, *user, "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def clear(path: Path) -> None:
    """Remove a work directory, but nothing that is mounted below it."""
    if any(
        Path(line.split()[4]).is_relative_to(path) for line in Path("/proc/self/mountinfo").read_text().splitlines()
    ):
        raise HostError(f"Something is mounted below {path}.", hint=f"findmnt | grep {path}; umount it and try again")
    try:
        remove(path)
    except PermissionError:  # files of our subordinate ids
        run([*namespaces(), "rm", "-rf", path])


def publish(built: Path, destination: Path) -> None:
    """Move a finished directory to its place, named by its content: if it is there already, that one stays."""
    fd = os.open(built, os.O_RDONLY | os.O_CLOEXEC)
    try:  # a crash of the host must not leave a name without content; a thousand files one by one would take seconds
        syncfs(fd)
    finally:
        os.close(fd)
    try:
        os.rename(built, destination)
    except OSError:  # it is not empty; another build may have the same result at the same moment
        if not destination.exists():
            raise
        remove(built)


def replace(built: Path, destination: Path) -> None:
    """Move a finished file to its place, over an older one."""
    sync(built)
    os.replace(built, destination)


def write(destination: Path, text: str, work: Path) -> None:
    """Write a small file in one step, by way of ``work``."""
    temporary = work / "pointer"
    temporary.write_text(text)
    replace(temporary, destination)


def require_space(directory: Path, needed: int) -> None:
    """Raise HostError unless ``needed`` bytes are free for us in ``directory``."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise HostError(
            f"Too little space in {directory}: {size(free)} free, {size(needed)} needed.",
            hint=f"free some, or use another data directory: FCVM_BASE_DIR=DIRECTORY; see: df -h {directory}",
        )
