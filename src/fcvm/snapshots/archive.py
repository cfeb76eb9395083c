"""Carry a snapshot to another host: one ``.tar.zst``, in which holes take no space.

GNU tar writes it (``--sparse`` looks for the holes) through zstd. Reading is done here, since an archive from elsewhere
is not trusted: it may hold a snapshot's own files and nothing else, and is published only when its ``config.json``
can be read.
"""

import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO

from fcvm.errors import NotFoundError, ProcessError, SnapshotError
from fcvm.process import find, run, spawn
from fcvm.snapshots import store
from fcvm.snapshots.manifest import Manifest
from fcvm.snapshots.store import Snapshot
from fcvm.storage.layout import Layout

KNOWN = (*store.REQUIRED, store.WORKING_SET, store.WRITTEN, store.OUTPUT)
BLOCK = 64 << 10  # bytes; blocks of zeros become holes


def export(layout: Layout, tag: str, path: Path | None) -> None:
    """Write the snapshot ``tag`` to the file at ``path``, whole or not at all; None: to stdout.

    A file that it makes is its owner's alone: it holds whatever the guest had in memory.

    Raises:
        NotFoundError: there is none. HostError: tar or zstd is not installed. SnapshotError: it cannot be written.
    """
    find("zstd")
    with store.use(layout, tag) as snapshot:
        names = [name for name in KNOWN if (snapshot.path / name).exists()]
        tar = ["tar", "--create", "--sparse", "--use-compress-program=zstd --threads=0 --quiet", "--format=gnu"]
        tar += ["--owner=0", "--group=0", "--directory", str(snapshot.path), "--file=-", *names]
        if path is None:
            _write(tar, sys.stdout.buffer)
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with _writing(path), open(temporary, "xb", opener=_private) as file:
                _write(tar, file)
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def import_archive(layout: Layout, path: Path | None, tag: str) -> Snapshot:
    """Make the snapshot ``tag`` from an archive that ``export`` wrote, on whatever host; None: from stdin.

    Raises:
        NotFoundError: the file cannot be read. SnapshotError: it is no such archive. ConflictError: the tag is taken.
        HostError: zstd is not installed, or there is no space left.
    """
    name = str(path or "stdin")
    with _reading(path) as file, store.creating(layout, tag) as directory:
        zstd = spawn(["zstd", "--decompress", "--stdout"], stdin=file, stdout=subprocess.PIPE)
        try:
            assert zstd.stdout is not None
            _unpack(zstd.stdout, name, directory)
            while zstd.stdout.read(BLOCK):  # padding
                pass
            if zstd.wait() != 0:
                raise _not_ours(name, "it is damaged")
        finally:
            zstd.kill()
            zstd.communicate()
        Manifest.read(directory)
    return store.find(layout, tag)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _reading(path: Path | None) -> AbstractContextManager[IO[bytes]]:
    if path is None:
        return nullcontext(sys.stdin.buffer)
    try:
        return open(path, "rb")
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read: {error.strerror}.", hint=f"ls -ld {path}") from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SnapshotError(f"{path} cannot be written: {error.strerror}.", hint=f"ls -ld {path.parent}") from error


def _write(tar: list[str], file: IO[bytes]) -> None:
    try:
        run(tar, stdout=file)
    except ProcessError as error:
        raise SnapshotError(f"The snapshot cannot be exported: {error.message}", hint="df -h") from error


def _unpack(stream: IO[bytes], name: str, directory: Path) -> None:
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as archive:
            for member in archive:
                if member.name not in KNOWN or not member.isreg():
                    raise _not_ours(name, f"it holds {member.name!r}")
                content = archive.extractfile(member)
                assert content is not None
                try:
                    _copy(content, directory / member.name, member.size)
                except OSError as error:
                    raise store.write_error(error, directory) from error
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise _not_ours(name, f"it is damaged, or something else ({error})") from error


def _copy(content: IO[bytes], path: Path, size: int) -> None:
    zeros = bytes(BLOCK)
    with open(path, "xb") as file:
        while block := content.read(BLOCK):
            if block == zeros[: len(block)]:
                file.seek(len(block), os.SEEK_CUR)
            else:
                file.write(block)
        file.truncate(size)


def _not_ours(name: str, why: str) -> SnapshotError:
    return SnapshotError(f"{name} is not an exported snapshot: {why}.", hint="fcvm snapshots export TAG FILE makes one")
