"""What the tests of images share: small images made by the writer of examples/, and a reader of EROFS."""

import os
import stat
import struct
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import archive  # noqa: E402

ARCHITECTURE = archive.MACHINES[os.uname().machine]


def lower() -> bytes:
    """A layer with one file of each kind, a hard link, an attribute, odd names."""
    capability = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"  # CAP_NET_BIND_SERVICE
    return archive.layer(
        [
            archive.directory("bin"),
            archive.File("bin/tool", b"#!/bin/sh\n", 0o4755),
            archive.File("bin/ping", b"ping", 0o755, pax={"SCHILY.xattr.security.capability": capability}),
            archive.File("bin/same", mode=0o4755, kind=tarfile.LNKTYPE, link="bin/tool"),
            archive.symlink("bin/sh", "tool"),
            archive.directory("dev"),
            archive.File("dev/null", mode=0o666, kind=tarfile.CHRTYPE, device=(1, 3)),
            archive.File("dev/pipe", mode=0o600, kind=tarfile.FIFOTYPE),
            archive.directory("etc", 0o750, 7, 8),
            archive.File("etc/kept", b"kept", 0o640, uid=7, gid=8),
            archive.File("etc/gone", b"gone"),
            archive.directory("replaced"),
            archive.File("replaced/old", b"old"),
            archive.directory("tmp", 0o1777),
            archive.File("large", bytes(range(256)) * 5000 + b"end", pax={"mtime": "1700000000.123456789"}),
            archive.File("h\u00e4\u00df lich\n", b"odd"),
            archive.File("empty"),
        ]
    )


def upper() -> bytes:
    """A layer that removes, replaces and adds."""
    return archive.layer(
        [
            archive.File("etc/.wh.gone"),
            archive.File("etc/new", b"new"),  # its directory is not in this layer
            archive.directory("replaced"),
            archive.File("replaced/.wh..wh..opq"),
            archive.File("replaced/young", b"young"),
            archive.File("empty", b"no more"),
        ]
    )


CONFIG = {"Env": ["A=1"], "Cmd": ["sh"], "Healthcheck": {"Test": ["CMD", "true"]}, "StopSignal": "SIGQUIT", "User": "7"}


def image(path: Path, *names: str, layers: list[bytes] | None = None, architecture: str = ARCHITECTURE) -> Path:
    """Write an image to ``path``."""
    archive.write(path, layers or [lower(), upper()], CONFIG, names=list(names), architecture=architecture)
    return path


@dataclass(frozen=True)
class Seen:
    """A file as the reader below sees it."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    links: int
    content: bytes
    xattrs: tuple[tuple[bytes, bytes], ...]
    device: int


def read_erofs(data: bytes) -> dict[str, Seen]:
    """Every file of an EROFS image by its path; written from the format's description, not from our writer.

    It checks what the kernel relies on: names are sorted over all blocks of a directory, and inline tails do not
    cross a block.
    """
    magic, bits, root = struct.unpack_from("<I", data, 1024)[0], data[1036], struct.unpack_from("<H", data, 1038)[0]
    assert (magic, 1 << bits) == (0xE0F5E1E2, 4096)
    assert struct.unpack_from("<I", data, 1024 + 36)[0] * 4096 == len(data)
    found: dict[str, Seen] = {}
    todo = [("/", root)]
    while todo:
        path, nid = todo.pop()
        seen = found[path] = _inode(data, nid * 32)
        if stat.S_ISDIR(seen.mode):
            entries = _entries(seen.content)
            names = [name for name, _, _ in entries]
            assert names == sorted(names), path
            for name, child, kind in entries:
                if name not in (b".", b".."):
                    todo.append((os.path.join(path, os.fsdecode(name)), child))
                    assert kind == _TYPES[stat.S_IFMT(_inode(data, child * 32).mode)]
    return found


_TYPES = {
    stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5, stat.S_IFSOCK: 6, stat.S_IFLNK: 7,
}  # fmt: skip
_PREFIXES = {1: b"user.", 2: b"system.posix_acl_access", 3: b"system.posix_acl_default", 4: b"trusted.", 6: b"security."}


def _inode(data: bytes, offset: int) -> Seen:
    form, words, mode, _, size, start, _, uid, gid, seconds, nanoseconds, links = struct.unpack_from(
        "<HHHHQIIIIqII", data, offset
    )
    assert form & 1
    head = 64 + (12 + 4 * (words - 1) if words else 0)
    tail = size % 4096
    if form >> 1 == 2:
        assert tail
        assert (offset + head) % 4096 + tail <= 4096
        content = data[start * 4096 :][: size - tail] + data[offset + head :][:tail]
    elif stat.S_IFMT(mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
        content = data[start * 4096 :][:size]
    else:
        content = b""
    xattrs, position, end = [], offset + 64 + 12, offset + head
    while words and position < end:
        length, prefix, value = struct.unpack_from("<BBH", data, position)
        name = data[position + 4 :][:length]
        xattrs.append((_PREFIXES[prefix] + name, data[position + 4 + length :][:value]))
        position += -(-(4 + length + value) // 4) * 4
    device = start if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0
    return Seen(mode, uid, gid, seconds * 10**9 + nanoseconds, links, content, tuple(sorted(xattrs)), device)


def _entries(content: bytes) -> list[tuple[bytes, int, int]]:
    entries = []
    for start in range(0, len(content), 4096):
        block = content[start : start + 4096]
        count = struct.unpack_from("<QH", block)[1] // 12
        offsets = [struct.unpack_from("<QHB", block, 12 * i) for i in range(count)]
        for i, (nid, offset, kind) in enumerate(offsets):
            end = offsets[i + 1][1] if i + 1 < count else len(block)
            entries.append((block[offset:end].rstrip(b"\0"), nid, kind))
    return entries
