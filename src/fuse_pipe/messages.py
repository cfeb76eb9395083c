"""Every message of the FUSE wire protocol: ``linux/fuse.h``, protocol 7.31 (Linux 5.4) to 7.45 (Linux 6.18).

A message is a header, a fixed structure, and a tail: names that end with NUL, data whose size the structure gives, or
records. ``REQUESTS`` lists what the kernel sends, ``REPLIES`` the structures that answer it, ``NOTIFICATIONS`` what a
server sends unasked. Each has the protocol minor version that it came with; ``KERNELS`` says in which Linux that was.
Numbers are in the byte order of the machine; every supported one is little endian.

Decoding is strict: a length that differs by one byte from what the message's fields say is a ``ProtocolError``.
"""

import struct
from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

from fuse_pipe.errors import ProtocolError

VERSION = 7
MINOR = 45
MINOR_LEAST = 31  # structures before it are shorter; nothing older than Linux 5.4 is served
ROOT_ID = 1

# Protocol minor version -> the Linux that brought it.
KERNELS = {
    1: "2.6.14",
    2: "2.6.14",
    3: "2.6.15",
    4: "2.6.16",
    5: "2.6.16",
    6: "2.6.16",
    7: "2.6.18",
    8: "2.6.20",
    9: "2.6.24",
    10: "2.6.28",
    11: "2.6.29",
    12: "2.6.31",
    13: "2.6.32",
    14: "2.6.35",
    15: "2.6.36",
    16: "2.6.38",
    17: "3.1",
    18: "3.3",
    19: "3.5",
    20: "3.6",
    21: "3.9",
    22: "3.10",
    23: "3.15",
    24: "4.5",
    25: "4.7",
    26: "4.9",
    27: "4.18",
    28: "4.20",
    29: "5.1",
    30: "5.2",
    31: "5.4",
    32: "5.10",
    33: "5.11",
    34: "5.14",
    35: "5.16",
    36: "5.17",
    37: "6.1",
    38: "6.2",
    39: "6.6",
    40: "6.9",
    41: "6.12",
    42: "6.14",
    43: "6.15",
    44: "6.16",
    45: "6.18",
}


class Layout:
    """A structure of the header: its ``name``, the protocol minor ``since`` which it has this form, and its fields.

    The fields are written as name and struct letter in turn (``"fh Q size I"``); there is no implicit padding in
    ``linux/fuse.h``.
    """

    __slots__ = ("_record", "fields", "name", "pack", "pack_into", "since", "size", "struct", "unpack_from")

    def __init__(self, name: str, since: int, spec: str) -> None:
        words = spec.split()
        self.name = name
        self.since = since
        self.fields = tuple(words[::2])
        self.struct = struct.Struct("<" + "".join(words[1::2]))
        self.size = self.struct.size
        self.pack = self.struct.pack
        self.pack_into = self.struct.pack_into
        self.unpack_from = self.struct.unpack_from
        self._record: Callable[..., Any] | None = None

    def decode(self, data: bytes | memoryview) -> Any:
        """A named tuple of the fields; the data must be exactly this structure."""
        if len(data) != self.size:
            raise ProtocolError(f"{self.name} has {self.size} bytes, not {len(data)}")
        if self._record is None:  # only when asked for: making one takes as long as a hundred messages
            self._record = namedtuple(self.name, self.fields)  # type: ignore[misc]  # made from a table
        return self._record(*self.unpack_from(data))

    def encode(self, **values: int) -> bytes:
        """The structure's bytes; fields not given are zero."""
        unknown = values.keys() - set(self.fields)
        if unknown:
            raise TypeError(f"{self.name} has no field {', '.join(sorted(unknown))}")
        return self.pack(*(values.get(field, 0) for field in self.fields))


# Headers. total_extlen (7.38) was padding before, so zero.
IN_HEADER = Layout(
    "in_header", 1, "len I opcode I unique Q nodeid Q uid I gid I pid I total_extlen H padding H"
)  # fmt: skip
OUT_HEADER = Layout("out_header", 1, "len I error i unique Q")
EXT_HEADER = Layout("ext_header", 38, "size I type I")

# Parts of replies.
ATTR = Layout(
    "attr",
    9,
    "ino Q size Q blocks Q atime q mtime q ctime q atimensec I mtimensec I ctimensec I mode I nlink I uid I gid I "
    "rdev I blksize I flags I",
)
ENTRY_OUT = Layout(
    "entry_out", 9, "nodeid Q generation Q entry_valid Q attr_valid Q entry_valid_nsec I attr_valid_nsec I "
    "ino Q size Q blocks Q atime q mtime q ctime q atimensec I mtimensec I ctimensec I mode I nlink I uid I gid I "
    "rdev I blksize I flags I",
)  # fmt: skip
ATTR_OUT = Layout(
    "attr_out", 9, "attr_valid Q attr_valid_nsec I dummy I "
    "ino Q size Q blocks Q atime q mtime q ctime q atimensec I mtimensec I ctimensec I mode I nlink I uid I gid I "
    "rdev I blksize I flags I",
)  # fmt: skip
STATX_OUT = Layout(
    "statx_out", 39, "attr_valid Q attr_valid_nsec I flags I spare0 Q spare1 Q "
    "mask I blksize I attributes Q nlink I uid I gid I mode H pad0 H ino Q size Q blocks Q attributes_mask Q "
    "atime q atimensec I pad1 i btime q btimensec I pad2 i ctime q ctimensec I pad3 i mtime q mtimensec I pad4 i "
    "rdev_major I rdev_minor I dev_major I dev_minor I " + " ".join(f"spare{n} Q" for n in range(2, 16)),
)  # fmt: skip
STATFS_OUT = Layout(
    "statfs_out",
    4,
    "blocks Q bfree Q bavail Q files Q ffree Q bsize I namelen I frsize I padding I spare0 Q spare1 Q spare2 Q",
)
OPEN_OUT = Layout("open_out", 1, "fh Q open_flags I backing_id i")
WRITE_OUT = Layout("write_out", 1, "size I padding I")
XATTR_OUT = Layout("getxattr_out", 1, "size I padding I")
LK_OUT = Layout("lk_out", 7, "start Q end Q type I pid I")
INIT_OUT = Layout(
    "init_out",
    23,
    "major I minor I max_readahead I flags I max_background H congestion_threshold H max_write I time_gran I "
    "max_pages H map_alignment H flags2 I max_stack_depth I request_timeout H unused0 H "
    "unused1 I unused2 I unused3 I unused4 I unused5 I",
)
BMAP_OUT = Layout("bmap_out", 8, "block Q")
IOCTL_OUT = Layout("ioctl_out", 11, "result i flags I in_iovs I out_iovs I")
POLL_OUT = Layout("poll_out", 11, "revents I padding I")
LSEEK_OUT = Layout("lseek_out", 24, "offset Q")
COPY_FILE_RANGE_OUT = Layout("copy_file_range_out", 45, "bytes_copied Q")
DIRENT = Layout("dirent", 1, "ino Q off Q namelen I type I")  # and the name, padded to 8 bytes

# What the kernel sends.
FORGET_IN = Layout("forget_in", 1, "nlookup Q")
FORGET_ONE = Layout("forget_one", 16, "nodeid Q nlookup Q")
BATCH_FORGET_IN = Layout("batch_forget_in", 16, "count I dummy I")
GETATTR_IN = Layout("getattr_in", 9, "getattr_flags I dummy I fh Q")
STATX_IN = Layout("statx_in", 39, "getattr_flags I reserved I fh Q sx_flags I sx_mask I")
SETATTR_IN = Layout(
    "setattr_in",
    23,
    "valid I padding I fh Q size Q lock_owner Q atime q mtime q ctime q atimensec I mtimensec I ctimensec I "
    "mode I unused4 I uid I gid I unused5 I",
)
MKNOD_IN = Layout("mknod_in", 12, "mode I rdev I umask I padding I")
MKDIR_IN = Layout("mkdir_in", 12, "mode I umask I")
RENAME_IN = Layout("rename_in", 1, "newdir Q")
RENAME2_IN = Layout("rename2_in", 23, "newdir Q flags I padding I")
LINK_IN = Layout("link_in", 1, "oldnodeid Q")
OPEN_IN = Layout("open_in", 33, "flags I open_flags I")  # open_flags was unused before
CREATE_IN = Layout("create_in", 33, "flags I mode I umask I open_flags I")  # likewise
READ_IN = Layout("read_in", 9, "fh Q offset Q size I read_flags I lock_owner Q flags I padding I")
WRITE_IN = Layout("write_in", 9, "fh Q offset Q size I write_flags I lock_owner Q flags I padding I")
RELEASE_IN = Layout("release_in", 8, "fh Q flags I release_flags I lock_owner Q")
FSYNC_IN = Layout("fsync_in", 1, "fh Q fsync_flags I padding I")
SETXATTR_IN_COMPAT = Layout("setxattr_in_compat", 1, "size I flags I")  # without FUSE_SETXATTR_EXT
SETXATTR_IN = Layout("setxattr_in", 33, "size I flags I setxattr_flags I padding I")
GETXATTR_IN = Layout("getxattr_in", 1, "size I padding I")
FLUSH_IN = Layout("flush_in", 7, "fh Q unused I padding I lock_owner Q")
INIT_IN_COMPAT = Layout("init_in_compat", 6, "major I minor I max_readahead I flags I")
INIT_IN = Layout(
    "init_in", 36, "major I minor I max_readahead I flags I flags2 I " + " ".join(f"unused{n} I" for n in range(11))
)  # fmt: skip
LK_IN = Layout("lk_in", 9, "fh Q owner Q start Q end Q type I pid I lk_flags I padding I")
ACCESS_IN = Layout("access_in", 3, "mask I padding I")
INTERRUPT_IN = Layout("interrupt_in", 7, "unique Q")
BMAP_IN = Layout("bmap_in", 8, "block Q blocksize I padding I")
IOCTL_IN = Layout("ioctl_in", 11, "fh Q flags I cmd I arg Q in_size I out_size I")
POLL_IN = Layout("poll_in", 21, "fh Q kh Q flags I events I")
NOTIFY_RETRIEVE_IN = Layout("notify_retrieve_in", 15, "dummy1 Q offset Q size I dummy2 I dummy3 Q dummy4 Q")
FALLOCATE_IN = Layout("fallocate_in", 19, "fh Q offset Q length Q mode I padding I")
LSEEK_IN = Layout("lseek_in", 24, "fh Q offset Q whence I padding I")
COPY_FILE_RANGE_IN = Layout("copy_file_range_in", 28, "fh_in Q off_in Q nodeid_out Q fh_out Q off_out Q len Q flags Q")
SETUPMAPPING_IN = Layout("setupmapping_in", 31, "fh Q foffset Q len Q flags Q moffset Q")
REMOVEMAPPING_IN = Layout("removemapping_in", 31, "count I")
REMOVEMAPPING_ONE = Layout("removemapping_one", 31, "moffset Q len Q")
SYNCFS_IN = Layout("syncfs_in", 34, "padding Q")

# What a server sends unasked.
NOTIFY_POLL_OUT = Layout("notify_poll_wakeup_out", 11, "kh Q")
NOTIFY_INVAL_INODE_OUT = Layout("notify_inval_inode_out", 12, "ino Q off q len q")
NOTIFY_INVAL_ENTRY_OUT = Layout("notify_inval_entry_out", 12, "parent Q namelen I flags I")
NOTIFY_STORE_OUT = Layout("notify_store_out", 15, "nodeid Q offset Q size I padding I")
NOTIFY_RETRIEVE_OUT = Layout("notify_retrieve_out", 15, "notify_unique Q nodeid Q offset Q size I padding I")
NOTIFY_DELETE_OUT = Layout("notify_delete_out", 18, "parent Q child Q namelen I padding I")

# enum fuse_opcode
LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK = 1, 2, 3, 4, 5, 6
MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, OPEN, READ, WRITE, STATFS, RELEASE = 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18
FSYNC, SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR = (
    20,
    21,
    22,
    23,
    24,
    25,
    26,
    27,
    28,
    29,
)
FSYNCDIR, GETLK, SETLK, SETLKW, ACCESS, CREATE, INTERRUPT, BMAP, DESTROY, IOCTL = 30, 31, 32, 33, 34, 35, 36, 37, 38, 39
POLL, NOTIFY_REPLY, BATCH_FORGET, FALLOCATE, READDIRPLUS, RENAME2, LSEEK = 40, 41, 42, 43, 44, 45, 46
COPY_FILE_RANGE, SETUPMAPPING, REMOVEMAPPING, SYNCFS, TMPFILE, STATX, COPY_FILE_RANGE_64 = 47, 48, 49, 50, 51, 52, 53


class Request(NamedTuple):
    """A message of the kernel: its structure and what follows it.

    ``tail`` is ``""`` (nothing), ``"name"``, ``"names"`` (two), ``"data"`` (as many bytes as the field ``size``
    or ``in_size`` says), ``"value"`` (a name, then ``size`` bytes) or ``"records"`` (``count`` of ``record``).
    """

    name: str
    since: int
    layout: Layout | None = None
    tail: str = ""
    record: Layout | None = None
    replies: bool = True


REQUESTS: dict[int, Request] = {
    LOOKUP: Request("LOOKUP", 1, None, "name"),
    FORGET: Request("FORGET", 1, FORGET_IN, replies=False),
    GETATTR: Request("GETATTR", 1, GETATTR_IN),
    SETATTR: Request("SETATTR", 1, SETATTR_IN),
    READLINK: Request("READLINK", 1),
    SYMLINK: Request("SYMLINK", 1, None, "names"),
    MKNOD: Request("MKNOD", 1, MKNOD_IN, "name"),
    MKDIR: Request("MKDIR", 1, MKDIR_IN, "name"),
    UNLINK: Request("UNLINK", 1, None, "name"),
    RMDIR: Request("RMDIR", 1, None, "name"),
    RENAME: Request("RENAME", 1, RENAME_IN, "names"),
    LINK: Request("LINK", 1, LINK_IN, "name"),
    OPEN: Request("OPEN", 1, OPEN_IN),
    READ: Request("READ", 1, READ_IN),
    WRITE: Request("WRITE", 1, WRITE_IN, "data"),
    STATFS: Request("STATFS", 1),
    RELEASE: Request("RELEASE", 1, RELEASE_IN),
    FSYNC: Request("FSYNC", 1, FSYNC_IN),
    SETXATTR: Request("SETXATTR", 1, SETXATTR_IN, "value"),
    GETXATTR: Request("GETXATTR", 1, GETXATTR_IN, "name"),
    LISTXATTR: Request("LISTXATTR", 1, GETXATTR_IN),
    REMOVEXATTR: Request("REMOVEXATTR", 1, None, "name"),
    FLUSH: Request("FLUSH", 1, FLUSH_IN),
    INIT: Request("INIT", 1, INIT_IN),
    OPENDIR: Request("OPENDIR", 1, OPEN_IN),
    READDIR: Request("READDIR", 1, READ_IN),
    RELEASEDIR: Request("RELEASEDIR", 1, RELEASE_IN),
    FSYNCDIR: Request("FSYNCDIR", 2, FSYNC_IN),
    GETLK: Request("GETLK", 7, LK_IN),
    SETLK: Request("SETLK", 7, LK_IN),
    SETLKW: Request("SETLKW", 7, LK_IN),
    ACCESS: Request("ACCESS", 3, ACCESS_IN),
    CREATE: Request("CREATE", 3, CREATE_IN, "name"),
    INTERRUPT: Request("INTERRUPT", 7, INTERRUPT_IN, replies=False),
    BMAP: Request("BMAP", 8, BMAP_IN),
    DESTROY: Request("DESTROY", 8),
    IOCTL: Request("IOCTL", 11, IOCTL_IN, "data"),
    POLL: Request("POLL", 11, POLL_IN),
    NOTIFY_REPLY: Request("NOTIFY_REPLY", 15, NOTIFY_RETRIEVE_IN, "data", replies=False),
    BATCH_FORGET: Request("BATCH_FORGET", 16, BATCH_FORGET_IN, "records", FORGET_ONE, replies=False),
    FALLOCATE: Request("FALLOCATE", 19, FALLOCATE_IN),
    READDIRPLUS: Request("READDIRPLUS", 21, READ_IN),
    RENAME2: Request("RENAME2", 23, RENAME2_IN, "names"),
    LSEEK: Request("LSEEK", 24, LSEEK_IN),
    COPY_FILE_RANGE: Request("COPY_FILE_RANGE", 28, COPY_FILE_RANGE_IN),
    SETUPMAPPING: Request("SETUPMAPPING", 31, SETUPMAPPING_IN),
    REMOVEMAPPING: Request("REMOVEMAPPING", 31, REMOVEMAPPING_IN, "records", REMOVEMAPPING_ONE),
    SYNCFS: Request("SYNCFS", 34, SYNCFS_IN),
    TMPFILE: Request("TMPFILE", 37, CREATE_IN, "name"),
    STATX: Request("STATX", 39, STATX_IN),
    COPY_FILE_RANGE_64: Request("COPY_FILE_RANGE_64", 45, COPY_FILE_RANGE_IN),
}

# The structures of an answer without an error; not listed: an empty answer, or data only (READ, READLINK, READDIR).
REPLIES: dict[int, tuple[Layout, ...]] = {
    LOOKUP: (ENTRY_OUT,),
    GETATTR: (ATTR_OUT,),
    SETATTR: (ATTR_OUT,),
    SYMLINK: (ENTRY_OUT,),
    MKNOD: (ENTRY_OUT,),
    MKDIR: (ENTRY_OUT,),
    LINK: (ENTRY_OUT,),
    OPEN: (OPEN_OUT,),
    WRITE: (WRITE_OUT,),
    STATFS: (STATFS_OUT,),
    INIT: (INIT_OUT,),
    OPENDIR: (OPEN_OUT,),
    GETLK: (LK_OUT,),
    CREATE: (ENTRY_OUT, OPEN_OUT),
    BMAP: (BMAP_OUT,),
    POLL: (POLL_OUT,),
    LSEEK: (LSEEK_OUT,),
    COPY_FILE_RANGE: (WRITE_OUT,),
    TMPFILE: (ENTRY_OUT, OPEN_OUT),
    STATX: (STATX_OUT,),
    COPY_FILE_RANGE_64: (COPY_FILE_RANGE_OUT,),
}

# enum fuse_notify_code: what the error field of a reply with unique 0 means. Numbers above 6 have no structure.
NOTIFY_POLL, NOTIFY_INVAL_INODE, NOTIFY_INVAL_ENTRY, NOTIFY_STORE, NOTIFY_RETRIEVE, NOTIFY_DELETE = 1, 2, 3, 4, 5, 6
NOTIFY_RESEND, NOTIFY_INC_EPOCH = 7, 8  # 7.40, 7.44
NOTIFICATIONS = {
    NOTIFY_POLL: NOTIFY_POLL_OUT,
    NOTIFY_INVAL_INODE: NOTIFY_INVAL_INODE_OUT,
    NOTIFY_INVAL_ENTRY: NOTIFY_INVAL_ENTRY_OUT,
    NOTIFY_STORE: NOTIFY_STORE_OUT,
    NOTIFY_RETRIEVE: NOTIFY_RETRIEVE_OUT,
    NOTIFY_DELETE: NOTIFY_DELETE_OUT,
}

# INIT flags, by bit; from 32 on in flags2.
ASYNC_READ, POSIX_LOCKS, FILE_OPS, ATOMIC_O_TRUNC, EXPORT_SUPPORT, BIG_WRITES, DONT_MASK, SPLICE_WRITE = (
    1 << n for n in range(8)
)
SPLICE_MOVE, SPLICE_READ, FLOCK_LOCKS, HAS_IOCTL_DIR, AUTO_INVAL_DATA, DO_READDIRPLUS, READDIRPLUS_AUTO, ASYNC_DIO = (
    1 << n for n in range(8, 16)
)
(
    WRITEBACK_CACHE,
    NO_OPEN_SUPPORT,
    PARALLEL_DIROPS,
    HANDLE_KILLPRIV,
    POSIX_ACL,
    ABORT_ERROR,
    MAX_PAGES,
    CACHE_SYMLINKS,
) = (1 << n for n in range(16, 24))
(
    NO_OPENDIR_SUPPORT,
    EXPLICIT_INVAL_DATA,
    MAP_ALIGNMENT,
    SUBMOUNTS,
    HANDLE_KILLPRIV_V2,
    SETXATTR_EXT,
    INIT_EXT,
    INIT_RESERVED,
) = (1 << n for n in range(24, 32))
(
    SECURITY_CTX,
    HAS_INODE_DAX,
    CREATE_SUPP_GROUP,
    HAS_EXPIRE_ONLY,
    DIRECT_IO_ALLOW_MMAP,
    PASSTHROUGH,
    NO_EXPORT_SUPPORT,
    HAS_RESEND,
) = (1 << n for n in range(32, 40))
ALLOW_IDMAP, OVER_IO_URING, REQUEST_TIMEOUT = (1 << n for n in range(40, 43))

FATTR_MODE, FATTR_UID, FATTR_GID, FATTR_SIZE, FATTR_ATIME, FATTR_MTIME, FATTR_FH, FATTR_ATIME_NOW, FATTR_MTIME_NOW = (
    1 << n for n in range(9)
)
FATTR_LOCKOWNER, FATTR_CTIME, FATTR_KILL_SUIDGID = 1 << 9, 1 << 10, 1 << 11
FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, FOPEN_NONSEEKABLE, FOPEN_CACHE_DIR, FOPEN_STREAM, FOPEN_NOFLUSH = (
    1 << n for n in range(6)
)
FOPEN_PARALLEL_DIRECT_WRITES, FOPEN_PASSTHROUGH = 1 << 6, 1 << 7
RELEASE_FLUSH, RELEASE_FLOCK_UNLOCK = 1, 2
GETATTR_FH = 1
LK_FLOCK = 1
WRITE_CACHE, WRITE_LOCKOWNER, WRITE_KILL_SUIDGID = 1, 2, 4
FSYNC_FDATASYNC = 1
OPEN_KILL_SUIDGID = 1
SETXATTR_ACL_KILL_SGID = 1
EXPIRE_ONLY = 1
EXT_GROUPS = 32
UNIQUE_INTERRUPT = 1  # set in the header of an INTERRUPT message: the rest of unique is the request's own
UNIQUE_RESEND = 1 << 63  # 7.40: the kernel sends this request again
DEV_IOC_CLONE = 0x8004E500  # _IOR(229, 0, uint32_t)
MIN_READ_BUFFER = 8192
NAME_MAX = 1024  # the longest name that the kernel sends; file systems allow 255

# The largest message that can come: a WRITE of max_write bytes, its structures, and slack for two long names.
MAX_WRITE = 1 << 20
MAX_REQUEST = MAX_WRITE + 64 * 1024


def split_name(data: bytes, what: str) -> tuple[bytes, bytes]:
    """A NUL-terminated string and what follows it."""
    name, nul, rest = data.partition(b"\0")
    if not nul:
        raise ProtocolError(f"{what}: a name has no end")
    return name, rest


def path_component(name: bytes, what: str) -> bytes:
    """``name`` if it can be the name of a directory entry: nothing that leads anywhere but into the directory."""
    if not name or b"/" in name or name in (b".", b".."):
        raise ProtocolError(f"{what}: {name!r} is not a name")
    return name


def decoder(opcode: int, request: Request) -> Callable[[memoryview], tuple[Any, ...]]:
    """A function from a message's body (header and extensions cut off) to its fields, then its names or data."""
    layout, what, tail = request.layout, request.name, request.tail
    size = layout.size if layout else 0
    unpack = layout.unpack_from if layout else None
    count_field = (
        next((n for n, f in enumerate(layout.fields) if f in ("size", "in_size", "count")), 0) if layout else 0
    )
    plain = opcode in (GETXATTR, REMOVEXATTR, TMPFILE)  # their names are not file names; TMPFILE's is "/"

    def fixed(body: memoryview) -> tuple[Any, ...]:
        if len(body) != size:
            raise ProtocolError(f"{what} has {size} bytes, not {len(body)}")
        return unpack(body) if unpack else ()

    def head(body: memoryview) -> tuple[Any, ...]:
        if len(body) < size:
            raise ProtocolError(f"{what} has at least {size} bytes, not {len(body)}")
        return unpack(body) if unpack else ()

    def name(body: memoryview) -> tuple[Any, ...]:
        fields = head(body)
        first, rest = split_name(bytes(body[size:]), what)
        if rest:
            raise ProtocolError(f"{what} has {len(rest)} bytes too many")
        return (*fields, first if plain else path_component(first, what))

    def names(body: memoryview) -> tuple[Any, ...]:
        fields = head(body)
        first, rest = split_name(bytes(body[size:]), what)
        second, rest = split_name(rest, what)
        if rest:
            raise ProtocolError(f"{what} has {len(rest)} bytes too many")
        path_component(first, what)
        return (*fields, first, second if opcode == SYMLINK else path_component(second, what))

    def data(body: memoryview) -> tuple[Any, ...]:
        fields = head(body)
        if len(body) != size + fields[count_field]:
            raise ProtocolError(f"{what} of {fields[count_field]} bytes has {len(body) - size}")
        return (*fields, body[size:])

    def value(body: memoryview) -> tuple[Any, ...]:
        fields = head(body)
        first, rest = split_name(bytes(body[size:]), what)
        if len(rest) != fields[count_field]:
            raise ProtocolError(f"{what} of {fields[count_field]} bytes has {len(rest)}")
        return (*fields, first, rest)

    def records(body: memoryview) -> tuple[Any, ...]:
        assert request.record
        fields = head(body)
        if len(body) != size + fields[count_field] * request.record.size:
            raise ProtocolError(f"{what} of {fields[count_field]} records has {len(body) - size} bytes")
        return (*fields, list(request.record.struct.iter_unpack(body[size:])))

    return {"": fixed, "name": name, "names": names, "data": data, "value": value, "records": records}[tail]


def init_decoder(body: memoryview) -> tuple[Any, ...]:
    """INIT has two sizes: the longer one since 7.36."""
    layout = INIT_IN if len(body) == INIT_IN.size else INIT_IN_COMPAT
    fields = layout.decode(body)
    return (*fields, 0)[:5] if layout is INIT_IN_COMPAT else tuple(fields[:5])


def decoders(setxattr_ext: bool = True) -> dict[int, Callable[[memoryview], tuple[Any, ...]]]:
    """A decoder for every opcode, for what INIT agreed on."""
    table = {opcode: decoder(opcode, request) for opcode, request in REQUESTS.items()}
    table[INIT] = init_decoder
    if not setxattr_ext:
        short = decoder(SETXATTR, REQUESTS[SETXATTR]._replace(layout=SETXATTR_IN_COMPAT))

        def setxattr(body: memoryview) -> tuple[Any, ...]:
            size, flags, name, value = short(body)
            return size, flags, 0, 0, name, value

        table[SETXATTR] = setxattr
    return table


def decode_groups(data: memoryview) -> tuple[int, ...]:
    """The supplementary groups among the extensions at a message's end (``FUSE_CREATE_SUPP_GROUP``)."""
    groups: tuple[int, ...] = ()
    while len(data):
        if len(data) < EXT_HEADER.size:
            raise ProtocolError("an extension is cut short")
        size, kind = EXT_HEADER.unpack_from(data)
        if size < EXT_HEADER.size or size % 8 or size > len(data):
            raise ProtocolError(f"an extension has a size of {size}")
        if kind == EXT_GROUPS:
            if size < 16:
                raise ProtocolError("the groups extension is cut short")
            (count,) = struct.unpack_from("<I", data, 8)
            if count > 32 or 12 + 4 * count > size:
                raise ProtocolError(f"the groups extension cannot hold {count} groups")
            groups = struct.unpack_from(f"<{count}I", data, 12)
        data = data[size:]
    return groups


def encode_request(
    opcode: int,
    number: int,
    nodeid: int = ROOT_ID,
    /,
    *tail: bytes,
    caller: tuple[int, int, int] = (0, 0, 0),
    extension: bytes = b"",
    **fields: int,
) -> bytes:
    """A message as the kernel would send it.

    Arguments:
        number: the request's ``unique``.
        tail: its names (NUL is added), data or packed records.
        caller: uid, gid and pid.
    """
    request = REQUESTS[opcode]
    body = request.layout.encode(**fields) if request.layout else b""
    ends = {"name": 1, "names": 2, "value": 1}.get(request.tail, 0)
    body += b"".join(part + b"\0" if n < ends else part for n, part in enumerate(tail)) + extension
    return IN_HEADER.pack(IN_HEADER.size + len(body), opcode, number, nodeid, *caller, len(extension) // 8, 0) + body


def decode_reply(opcode: int, data: bytes) -> tuple[int, int, tuple[Any, ...], bytes]:
    """A server's answer: unique, errno (0: none), the structures of ``REPLIES``, and the data after them."""
    if len(data) < OUT_HEADER.size:
        raise ProtocolError("a reply is cut short")
    length, error, unique = OUT_HEADER.unpack_from(data)
    if length != len(data) or error > 0:
        raise ProtocolError(f"a reply of {len(data)} bytes says {length}, error {error}")
    rest = data[OUT_HEADER.size :]
    if error:
        if rest:
            raise ProtocolError("an error has data")
        return unique, -error, (), b""
    structures = []
    for layout in REPLIES.get(opcode, ()):
        structures.append(layout.decode(rest[: layout.size]))
        rest = rest[layout.size :]
    return unique, 0, tuple(structures), rest


def notification(code: int, *fields: int, tail: bytes = b"") -> bytes:
    """What a server sends unasked: unique 0, the code in place of the error."""
    body = (NOTIFICATIONS[code].pack(*fields) if code in NOTIFICATIONS else b"") + tail
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), code, 0) + body
