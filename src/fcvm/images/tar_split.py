"""Records how a layer's tar was put together, so that Podman can put it together again, byte for byte.

Podman keeps the files of a layer, not its tar, but `podman save` and `podman push` in the guest need the tar with the
digest that the manifest names. So beside each layer is a record in the format of github.com/vbatts/tar-split
(tar/storage/entry.go): gzip of JSON lines, which are either a segment of the tar, verbatim (headers, padding), or a file
by its name, whose content is taken from the layer and must have the CRC-64 (ISO 3309) given.
"""

import base64
import gzip
import io
import json
from collections.abc import Callable
from typing import Any

from fcvm.images.crc64 import crc64

FILE, SEGMENT = 1, 2
FLUSH = 64 << 20  # bytes of a segment that are kept in memory
MOST = 1 << 30  # bytes of a record; it is about a hundredth of the layer


class Recorder:
    """Given all bytes of a tar as they are read, and told where the contents of files are, makes the record.

    ``feed`` gets what is read from the tar, which may be ahead of the file that is being read.
    """

    def __init__(self) -> None:
        self._ahead = bytearray()  # what was read and is not yet recorded
        self._offset = 0  # where in the tar that starts
        self._position = 0
        self._packed = io.BytesIO()
        self._out = gzip.GzipFile(fileobj=self._packed, mode="wb", compresslevel=1, mtime=0)

    def feed(self, data: bytes) -> None:
        """The next bytes of the tar."""
        self._ahead += data

    def file(self, name: str, offset: int, size: int, read: Callable[[int], bytes]) -> Callable[[int], bytes]:
        """A file's content starts at ``offset``: returns a ``read`` to use in place of the one given; ``end`` ends it."""
        self._segment(offset - self._offset)
        self._file = (name, size)
        self._crc = 0

        def reading(count: int) -> bytes:
            data = read(count)
            self._crc = crc64(data, self._crc)
            del self._ahead[: len(data)]
            self._offset += len(data)
            return data

        return reading

    def passing(self, read: Callable[[int], bytes]) -> Callable[[int], bytes]:
        """The same for a file whose content the record is to hold itself."""

        def reading(count: int) -> bytes:
            data = read(count)
            self.flush()
            return data

        return reading

    def end(self) -> None:
        """The content of the file has been read."""
        name, size = self._file
        try:
            named: dict[str, Any] = {"name": name.encode().decode()}
        except UnicodeEncodeError:
            named = {"name_raw": _base64(name.encode("utf-8", "surrogateescape"))}
        self._entry({"type": FILE, **named, "size": size, "payload": _base64(self._crc.to_bytes(8, "big"))})

    def finish(self) -> bytes:
        """The record, once all of the tar has been fed."""
        self._segment(len(self._ahead))
        self._out.close()
        return self._packed.getvalue()

    def flush(self) -> None:
        """Nothing that has been fed belongs to a file that is still to come."""
        if len(self._ahead) >= FLUSH:
            self._segment(len(self._ahead))

    def _segment(self, size: int) -> None:
        if size:
            self._entry({"type": SEGMENT, "payload": _base64(bytes(self._ahead[:size]))})
            del self._ahead[:size]
            self._offset += size

    def _entry(self, entry: dict[str, Any]) -> None:
        self._out.write(json.dumps(entry | {"position": self._position}, separators=(",", ":")).encode() + b"\n")
        self._position += 1
        if self._packed.tell() > MOST:
            raise ValueError("it holds too much beside the contents of its files")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
