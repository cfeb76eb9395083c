"""Where everything lies on disk: one data directory, ``FCVM_BASE_DIR``.

    kernels/<key>/vmlinux, vmlinuz, modules/     setup/kernel.py
    guest/<key>/root.img                         setup/guest.py    (erofs, read-only, shared)
    initrd/<key>/initrd.img                      setup/initrd.py
    bin/<sha256>/firecracker                     setup/firecracker.py
    images/<digest>.img, names.json              images/store.py   (erofs image stores)
    vms/<id>/                                    vm/               (Firecracker's working directory)
    snapshots/<tag>/                             snapshots/store.py
    state/<id>.json, <id>.lock                   vm/state.py
    servers/<pid>/                               snapshots/servers.py
    machine/                                     machine/
    cache/                                       downloads and templates; may be deleted at any time

Whatever is built is named by the hash of what it was built from, made under a lock in ``<name>.creating`` beside its
place and renamed in (``publish``), so a reader never sees half of it and a kill leaves only a ``.creating`` that the
next builder removes.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fc_agent.structs import Struct


class Layout(Struct):
    """The data directory at ``base``; every property is a directory, made when it is first asked for."""

    base: Path

    def directory(self, name: str) -> Path:
        """``base/name``, made if it is missing (parents too)."""
        path = self.base / name
        path.mkdir(parents=True, exist_ok=True)
        return path

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


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold an flock on ``path`` (made if missing), waiting for whoever has it; it ends with the process at the latest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a file or a whole directory; one that is not there is fine. Of a directory, ``ignore_errors`` leaves what must stay."""
    if path.is_dir() and not path.is_symlink():
        import shutil

        shutil.rmtree(path, ignore_errors=ignore_errors)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Build ``path`` (a file or a directory) under a lock and rename it in when the block ends well.

    Yields a temporary path beside it for the caller to create. If ``path`` appears while we wait for the lock, the
    caller should look again inside the block and return early: a block that creates nothing publishes nothing.
    """
    temporary = path.with_name(path.name + ".creating")
    with locked(path.with_name(f".{path.name}.lock")):
        remove(temporary)
        try:
            yield temporary
            if temporary.exists():
                os.replace(temporary, path)
        finally:
            remove(temporary)
