"""Where everything lies on disk: one data directory, ``FCVM_BASE_DIR``.

    kernels/<key>/vmlinux, vmlinuz, modules/     setup/kernel.py
    guest/<key>/root.img                         setup/guest.py    (erofs, read-only, shared)
    initrd/<key>/initrd.img                      setup/initrd.py
    bin/<sha256>/firecracker                     setup/firecracker.py
    images/<digest>.img, names.json              images/store.py   (erofs image stores)
    vms/<id>/                                    vm/               (Firecracker's working directory)
    snapshots/<tag>/                             snapshots/store.py
    state/<id>.json, <id>.lock, <name>.name      vm/state.py
    servers/<pid>/                               snapshots/servers.py
    machine/                                     machine/
    cache/                                       downloads and templates; may be deleted at any time

Whatever is built is named by the hash of what it was built from, made under a lock in ``<name>.creating`` beside its
place and renamed in (storage/publish.py), so a reader never sees half of it and a kill leaves only a ``.creating`` that the
next builder removes.
"""

from __future__ import annotations

import fcntl
import os

from fc_agent.structs import Struct
from fcvm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path


class Layout(Struct):
    """The data directory ``root``; every property but ``base`` is a directory in it, made when it is first asked for.

    The commands that count milliseconds use the text, with ``place``: importing pathlib takes five of them.
    """

    root: str | os.PathLike[str]

    @property
    def base(self) -> Path:
        """The data directory as a path."""
        from pathlib import Path

        return Path(self.root)

    def place(self, name: str) -> str:
        """``root/name``, made if it is missing (parents too).

        Raises:
            HostError: it is not there and cannot be made.
        """
        path = os.path.join(self.root, name)
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
            raise HostError(
                f"The data directory {self.root} cannot be used: {reason}.", hint="FCVM_BASE_DIR=DIRECTORY chooses another place"
            ) from error
        return path

    def directory(self, name: str) -> Path:
        """``place(name)`` as a path."""
        from pathlib import Path

        return Path(self.place(name))

    @property
    def kernels(self) -> Path:
        return self.directory("kernels")

    @property
    def guest(self) -> Path:
        return self.directory("guest")

    @property
    def initrd(self) -> Path:
        return self.directory("initrd")

    @property
    def bin(self) -> Path:
        return self.directory("bin")

    @property
    def images(self) -> Path:
        return self.directory("images")

    @property
    def vms(self) -> Path:
        return self.directory("vms")

    @property
    def snapshots(self) -> Path:
        return self.directory("snapshots")

    @property
    def state(self) -> Path:
        return self.directory("state")

    @property
    def machine(self) -> Path:
        return self.directory("machine")

    @property
    def cache(self) -> Path:
        return self.directory("cache")


class locked:
    """Hold an flock on ``path`` (made if missing) inside a block, waiting for whoever has it; it ends with the process at the latest."""

    def __init__(self, path: str | os.PathLike[str], *, shared: bool = False) -> None:
        self.path = path
        self.kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX

    def __enter__(self) -> None:
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self.fd, self.kind)
        except BaseException:
            os.close(self.fd)
            raise

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def is_held(path: str | os.PathLike[str]) -> bool:
    """Whether somebody has an flock on a file or directory: asked of the kernel. What cannot be opened is held by nobody."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: others who look now do not make it seem held
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def wait_until_free(path: str | os.PathLike[str]) -> None:
    """Wait until nobody has an flock on a file or directory; one that is not there is free."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def remove(path: str | os.PathLike[str], *, ignore_errors: bool = False) -> None:
    """Remove a file or a whole directory; one that is not there is fine. Of a directory, ``ignore_errors`` leaves what must stay."""
    if os.path.isdir(path) and not os.path.islink(path):
        import shutil

        while os.path.lexists(path):
            try:
                shutil.rmtree(path, ignore_errors=ignore_errors)
                return
            except FileNotFoundError:  # somebody else removes it as well
                continue
    else:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass


def linked(parent: str | os.PathLike[str]) -> set[str]:
    """What the symbolic links in the directories of ``parent`` lead to: the disks that VMs have. Any may go meanwhile."""
    found: set[str] = set()
    for directory in os.listdir(parent):
        try:
            names = os.listdir(os.path.join(parent, directory))
        except OSError:  # a file, or gone
            continue
        for name in names:
            try:
                found.add(os.readlink(os.path.join(parent, directory, name)))
            except OSError:  # no link, or gone
                continue
    return found
