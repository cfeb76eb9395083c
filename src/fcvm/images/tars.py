"""Reads tars that may be hostile.

What stands before a file's content, tarfile keeps in memory before it says anything: extended headers, long names, maps of sparse
files, however long they are. So it gets no more than ``MOST`` bytes between the contents of two files.
"""

import io
import tarfile
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import IO, cast

from fcvm.images import compression

MOST = 1 << 20  # bytes; Podman and Docker (Go's archive/tar) take no header that is longer
MOST_MEMBERS = 100_000  # of an archive of images: each layer is one to three
BUFFER = 1 << 20


def archive(path: Path) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """The members of an archive that holds an image, compressed or not.

    Raises:
        OSError, zlib.error, lzma.LZMAError: it cannot be read, or decompressed; the rest as ``members``.
        HostError: it is compressed with zstd and that program is not installed.
    """
    with compression.decompressed(path) as (content, _):
        for number, member in enumerate(members(content)):
            if number == MOST_MEMBERS:
                raise ValueError(f"it has more than {MOST_MEMBERS} files")
            yield member


def members(stream: IO[bytes]) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """Every member of the tar in ``stream``, and the content of those that are files: to be read before the next one is asked for.

    Arguments:
        stream: need not be able to seek, but gives less than it is asked for at its end only.

    Raises:
        tarfile.TarError, EOFError, ValueError, RecursionError: it is not a tar, is damaged, or more than MOST describes a file.
    """
    source = _Source(stream)
    with tarfile.open(fileobj=cast(IO[bytes], source), mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (member := tar.next()) is not None:
            if member.size < 0:
                raise ValueError(f"{member.name[:80]!r} has a size of {member.size}")
            if tar.pax_headers and sum(len(key) + len(value) for key, value in tar.pax_headers.items()) > MOST:
                raise ValueError("it has too much to say about all of its files")
            source.left = inf
            yield member, tar.extractfile(member) if member.isreg() else None
            source.left = MOST
            tar.members = []  # type: ignore[attr-defined]  # or it would keep every one


class _Source(io.RawIOBase):
    """A stream as tarfile sees it: seeks forward, reads up to ``left`` bytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.left: float = MOST
        self._stream = stream
        self._seekable = stream.seekable()
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        if size > self.left:
            raise ValueError(f"the description of a file has more than {MOST} bytes")
        data = self._stream.read(size) or b""
        self.left -= len(data)
        self._position += len(data)
        return data

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        if position < self._position or whence != io.SEEK_SET:
            raise ValueError("the parts of a file are not in order")
        if self._seekable:
            self._position = self._stream.seek(position)
        while self._position < position and (data := self._stream.read(min(BUFFER, position - self._position))):
            self._position += len(data)
        return self._position
