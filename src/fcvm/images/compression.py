"""Opens a layer's blob: finds out how it is compressed, decompresses it, and checks that its content is what it should be."""

import bz2
import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from fcvm import process
from fcvm.errors import ImageError

BUFFER = 1 << 20

# Compression numbers of containers/storage (pkg/archive), and the magic bytes that tell.
NONE, BZIP2, GZIP, XZ, ZSTD = range(5)
MAGIC = ((b"BZh", BZIP2), (b"\x1f\x8b\x08", GZIP), (b"\xfd7zXZ\0", XZ), (b"\x28\xb5\x2f\xfd", ZSTD))


# Bytes of memory for an xz stream: its dictionary, for the most part, which is 64 MiB with `xz -9`. The program zstd has a limit
# of its own (128 MiB, the most without `--ultra --long`), bzip2 and gzip have small windows.
MOST_WINDOW = 256 << 20


class LayerStream(io.RawIOBase):
    """The uncompressed content of a layer; ``kind`` is how it was compressed."""

    def __init__(self, content: IO[bytes], kind: int) -> None:
        self.kind = kind
        self._content = content
        self._hash = hashlib.sha256()
        self._size = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._content.read(size)
        self._hash.update(data)
        self._size += len(data)
        return data

    def finish(self, expected: str) -> int:
        """Read what is left and return the size of all of it in bytes.

        Raises:
            ImageError: the content's digest is not ``expected``.
        """
        while self.read(BUFFER):
            pass
        if "sha256:" + self._hash.hexdigest() != expected:
            raise ImageError("A layer of the image is damaged: its content is not what the configuration names.")
        return self._size


class _Counted(io.RawIOBase):
    """A file that reports how much of it was read."""

    def __init__(self, file: IO[bytes], progress: Callable[[int], object]) -> None:
        self._file = file
        self._progress = progress

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._progress(len(data))
        return data

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(position, whence)


class _Xz(io.RawIOBase):
    """The content of an xz file, which may have several streams: an LZMAFile takes any dictionary."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_WINDOW)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        data = b""
        while not data:
            packed = b""
            if self._stream.eof:
                packed = self._stream.unused_data.lstrip(b"\0")  # between streams there may be zeros
                while not packed:
                    if not (more := self._file.read(BUFFER)):
                        return 0
                    packed = more.lstrip(b"\0")
                self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_WINDOW)
            elif self._stream.needs_input and not (packed := self._file.read(BUFFER)):
                raise EOFError
            data = self._stream.decompress(packed, len(buffer))
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def open_layer(path: Path, progress: Callable[[int], object]) -> Iterator[LayerStream]:
    """The content of the layer whose blob is at ``path``.

    Arguments:
        progress: called with the number of bytes of the blob that were read.

    Raises:
        ImageError: on the way, if the blob is damaged.
        HostError: it is compressed with zstd and that program is not installed.
    """
    with decompressed(path, progress) as (content, kind):
        try:
            yield LayerStream(content, kind)
        except (OSError, lzma.LZMAError, zlib.error, EOFError) as error:
            if getattr(error, "errno", None) is not None:  # not the blob's fault: no space left, for example
                raise
            raise ImageError("A layer of the image is damaged: it cannot be decompressed.") from error


@contextmanager
def decompressed(path: Path, progress: Callable[[int], object] = lambda done: None) -> Iterator[tuple[IO[bytes], int]]:
    """The content of a file that may be compressed, and how it is; errors are those of the modules that decompress."""
    with path.open("rb", buffering=0) as blob:
        magic = blob.read(6)
        blob.seek(0)
        kind = next((kind for start, kind in MAGIC if magic.startswith(start)), NONE)
        if kind == ZSTD:
            with process.spawn([process.find("zstd"), "-dcq"], stdin=blob, stdout=-1) as child:
                assert child.stdout is not None
                try:
                    yield child.stdout, kind
                    progress(path.stat().st_size)
                finally:
                    child.kill()
            return
        counted = cast(IO[bytes], io.BufferedReader(_Counted(blob, progress), BUFFER))
        openers: dict[int, Callable[[IO[bytes]], object]] = {
            BZIP2: bz2.BZ2File,
            GZIP: lambda file: gzip.GzipFile(fileobj=file),
            XZ: lambda file: io.BufferedReader(_Xz(file), BUFFER),
        }
        yield cast(IO[bytes], openers[kind](counted) if kind in openers else counted), kind
