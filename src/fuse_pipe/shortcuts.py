"""What the relay answers by itself, because the round trip to the server would be for nothing.

- FLUSH of a file that was neither written, copied into nor locked since the last one.
- Whether a file made a moment ago has capabilities, which the kernel asks before it is first written or given away.
- RELEASE: nobody waits for it. The server is told not to answer (``QUIET``).
- WRITE, unless the file was opened with O_SYNC, O_DSYNC or O_DIRECT, or is the host's kernel's own (``/sys``), which may
  refuse the value: it is answered at once and goes to the server as QUIET. Everything later goes the same way behind it,
  so whoever asks sees what was written; the host does when the file is closed or synced, and mostly at once. An error is
  told once to everybody who had the file open then, by the next write, close or fsync, and writes wait for the server's
  answer again for a while, so that who fills a disk learns it.
- GETATTR of a directory in which names were just changed, and of a file just closed: the kernel asks next, always, so
  the server sends the attributes ahead of its answer (``ATTRIBUTES``). They are dropped when anything that passes here
  could change them, and when the server notifies of anything that it noticed after it sent them.
"""

import errno
import itertools
import os
import struct
import threading
from time import monotonic
from typing import NamedTuple

from fuse_pipe import messages as m
from fuse_pipe.channel import ATTRIBUTES, QUIET_AT, Channel

BEHIND_MOST = 4 << 20  # bytes of requests that the server may not have seen when a write is answered
BEHIND_END = 1 << 42  # writes up to here are answered at once; how large a file may be is for the host to say
CAUTIOUS = 10.0  # seconds without early answers after a write that failed
FRESH = 10.0  # seconds that attributes sent ahead are good for, or for as long as the kernel may believe them
FRESH_CONTENT = 0.05
NEW = 1.0  # seconds for which a file is new
CONTENTS = 64  # small files sent ahead, at most
REMEMBERED = 4096  # nodes of each kind, at most

_WRITE = struct.Struct("<QIIQI")  # struct fuse_write_in from offset on
_WRITE_AT = m.IN_HEADER.size + 8
_WRITE_OUT = struct.Struct("<IiQII")
_COPIED_TO_AT = m.IN_HEADER.size + 16  # nodeid_out in struct fuse_copy_file_range_in
_NAME_AT = m.IN_HEADER.size + m.GETXATTR_IN.size
_CAPABILITY = b"security.capability\0"
_SYNCHRONOUS = os.O_SYNC | os.O_DSYNC | os.O_DIRECT
_AHEAD = struct.Struct("<IiQQ")  # header of ATTRIBUTES or CONTENT with the node's id; notifications sent before
_READ = struct.Struct("<QQI")  # struct fuse_read_in up to size
_OPEN_FLAGS = struct.Struct("<I")
_NODE = _HANDLE = struct.Struct("<Q")
_COUNT = struct.Struct("<I")
_FORGOTTEN_AT = m.IN_HEADER.size + m.BATCH_FORGET_IN.size
_MODE_AT = m.ATTR_OUT.fields.index("mode")

_NAMES = (m.CREATE, m.MKNOD, m.MKDIR, m.SYMLINK, m.LINK, m.UNLINK, m.RMDIR, m.RENAME, m.RENAME2)
_CHANGES = frozenset((
    *_NAMES, m.WRITE, m.SETATTR, m.SETXATTR, m.REMOVEXATTR, m.FALLOCATE, m.COPY_FILE_RANGE, m.COPY_FILE_RANGE_64,
    m.TMPFILE, m.SETLK, m.SETLKW,
))  # fmt: skip  # locks: who waited for one wants to see what was written before it was given up
_READS = frozenset((m.READ, m.READDIR, m.READDIRPLUS))  # change the access time only
_COPIES = frozenset((m.COPY_FILE_RANGE, m.COPY_FILE_RANGE_64))
_ANY_FILE = frozenset((m.LINK, m.UNLINK, m.RENAME, m.RENAME2, *_COPIES))
_ANY = frozenset((m.RMDIR, m.RENAME, m.RENAME2))
_OPENS = frozenset((m.OPEN, m.CREATE, m.TMPFILE))
_WATCHED = frozenset((*_NAMES, *_OPENS, m.FLUSH, m.FSYNC))  # whose answers are looked at
_SYNCS = frozenset((m.FLUSH, m.FSYNC))
NOTED = frozenset((
    *_CHANGES, *_READS, *_WATCHED, m.GETATTR, m.GETXATTR, m.RELEASE, m.RELEASEDIR, m.FORGET, m.BATCH_FORGET,
))  # fmt: skip


class Known(NamedTuple):
    """What was sent ahead: in answer to the request of which ``turn``; good ``until`` then."""

    nodeid: int
    turn: int
    until: float
    directory: bool
    data: bytes


class Failure(NamedTuple):
    """A write of a file has failed that was answered already; for all handles up to ``newest`` but those ``told``."""

    errno: int
    newest: int
    told: set[int]


class Shortcuts:
    """What one mount's relay knows. ``request`` sees what goes up, the other methods what comes down."""

    def __init__(self, notifications: Channel, *, behind: bool) -> None:
        """
        Arguments:
            notifications: the channel that counts those that came.
            behind: whether writes may be answered early; not with several channels, which overtake one another.
        """
        self.notifications = notifications
        self.behind = behind
        self.quiet = False  # whether the server knows of QUIET; set with each connection
        self.locked: set[int] = set()  # nodes with record locks: their FLUSH gives locks up
        self.written: dict[int, int] = {}  # node -> the turn of the last write or copy, until a FLUSH after it was answered
        self._settled: dict[int, int] = {}  # node -> the turn of the last FLUSH that was answered
        self.asked: dict[int, tuple[int, int, int, int]] = {}  # unique -> opcode, node, turn, handle; those in _WATCHED
        self._new: dict[int, float] = {}  # nodes made here, of whose capabilities nothing was set since -> when
        self._failed: dict[int, Failure] = {}
        self._opens: dict[int, int] = {}  # node -> how often it is open
        self._direct: set[int] = set()  # handles of files of the host's kernel: a write's answer is what came of it
        self._lock = threading.Lock()  # for _opens: answers are seen by other threads than requests
        self._cautious = 0.0
        self._turns = itertools.count(1)
        self._changed: dict[int, int] = {}  # node -> the turn of the last request that may change its attributes
        self._changed_before = 0  # nodes that are not in _changed may have been, up to this turn
        self._files_changed = self._all_changed = 0
        self._attributes: dict[int, Known] = {}  # node -> what was sent ahead
        self._contents: dict[int, Known] = {}  # handle -> likewise

    # ---- up

    def request(
        self, channel: Channel, opcode: int, unique: int, nodeid: int, buffer: bytearray, size: int
    ) -> bytes | None:
        """See a request in ``NOTED``; the answer to give now, if any. It is passed on if it has none or is marked
        QUIET.
        """
        if opcode == m.GETATTR:
            return self._answer(unique, self._attributes.pop(nodeid, None))
        if opcode in _READS:
            self._attributes.pop(nodeid, None)
            return self._read(unique, buffer) if opcode == m.READ and self._contents else None
        if opcode == m.RELEASE or opcode == m.RELEASEDIR:
            if opcode == m.RELEASE:
                with self._lock:
                    left = self._opens.get(nodeid, 1) - 1
                    if left:
                        self._opens[nodeid] = left
                    else:
                        self._opens.pop(nodeid, None)
                if self._direct:
                    self._direct.discard(*_HANDLE.unpack_from(buffer, m.IN_HEADER.size))
            if not self.quiet:
                return None
            if self._contents:
                (number,) = _HANDLE.unpack_from(buffer, m.IN_HEADER.size)
                self._contents.pop(number, None)
            buffer[QUIET_AT] = 1
            return m.OUT_HEADER.pack(m.OUT_HEADER.size, 0, unique)
        if opcode in _CHANGES:
            self._change(opcode, nodeid)
        if opcode == m.WRITE:
            return self._write(channel, unique, nodeid, buffer)
        if opcode == m.FLUSH:
            if nodeid not in self.locked and self._is_settled(nodeid):
                number = self._failure(nodeid, *_HANDLE.unpack_from(buffer, m.IN_HEADER.size)) if self._failed else 0
                return m.OUT_HEADER.pack(m.OUT_HEADER.size, -number, unique)
        elif opcode == m.GETXATTR:
            made = self._new.get(nodeid)
            if made is not None and buffer[_NAME_AT:size] == _CAPABILITY:
                if monotonic() - made < NEW:
                    return m.OUT_HEADER.pack(m.OUT_HEADER.size, -errno.ENODATA, unique)
                self._new.pop(nodeid, None)
        elif opcode == m.OPEN:
            if _OPEN_FLAGS.unpack_from(buffer, m.IN_HEADER.size)[0] & os.O_TRUNC:
                self._change(opcode, nodeid)
        elif opcode == m.SETXATTR:
            self._new.pop(nodeid, None)
        elif opcode == m.SETLK or opcode == m.SETLKW:
            self.locked.add(nodeid)
        elif opcode in _COPIES:
            self.written[_NODE.unpack_from(buffer, _COPIED_TO_AT)[0]] = next(self._turns)
        elif opcode == m.FORGET:
            self._forget(nodeid)
        elif opcode == m.BATCH_FORGET:
            (count,) = _COUNT.unpack_from(buffer, m.IN_HEADER.size)
            for number in range(count):
                self._forget(*_HANDLE.unpack_from(buffer, _FORGOTTEN_AT + number * m.FORGET_ONE.size))
        if opcode in _WATCHED:
            (handle,) = _HANDLE.unpack_from(buffer, m.IN_HEADER.size) if opcode in _SYNCS else (0,)
            self.asked[unique] = opcode, nodeid, next(self._turns), handle
        return None

    def _forget(self, nodeid: int) -> None:
        """The kernel gives back references to a file, all of them only if nobody has it open; then nobody has a lock."""
        if nodeid in self._opens:
            return
        self.locked.discard(nodeid)
        self.written.pop(nodeid, None)
        self._settled.pop(nodeid, None)
        self._failed.pop(nodeid, None)

    def _is_settled(self, nodeid: int) -> bool:
        """Whether a FLUSH was answered since the last write."""
        written = self.written.get(nodeid)
        if written is not None:
            if self._settled.get(nodeid, 0) < written:
                return False
            self.written.pop(nodeid, None)
            self._settled.pop(nodeid, None)
        return True

    def _failure(self, nodeid: int, handle: int) -> int:
        """The errno that this open file is to be told now, if any."""
        failure = self._failed.get(nodeid)
        if failure is None or handle > failure.newest or handle in failure.told:
            return 0
        failure.told.add(handle)
        return failure.errno

    def _write(self, channel: Channel, unique: int, nodeid: int, buffer: bytearray) -> bytes | None:
        self.written[nodeid] = next(self._turns)
        if self._failed and (number := self._failure(nodeid, *_HANDLE.unpack_from(buffer, m.IN_HEADER.size))):
            return m.OUT_HEADER.pack(m.OUT_HEADER.size, -number, unique)
        if not (self.quiet and self.behind) or channel.sock is None or channel.kept > BEHIND_MOST:
            return None
        if self._direct and _HANDLE.unpack_from(buffer, m.IN_HEADER.size)[0] in self._direct:
            return None
        offset, count, _, _, flags = _WRITE.unpack_from(buffer, _WRITE_AT)
        if flags & _SYNCHRONOUS or offset + count > BEHIND_END or (self._cautious and self._is_cautious()):
            return None
        buffer[QUIET_AT] = 1
        return _WRITE_OUT.pack(_WRITE_OUT.size, 0, unique, count, 0)

    def _is_cautious(self) -> bool:
        if monotonic() < self._cautious:
            return True
        self._cautious = 0.0
        return False

    def _change(self, opcode: int, nodeid: int) -> None:
        turn = next(self._turns)
        changed = self._changed
        if len(changed) >= REMEMBERED:
            self._changed_before = turn
            changed.clear()
        changed[nodeid] = turn
        if opcode in _ANY_FILE:
            self._files_changed = turn
        if opcode in _ANY:
            self._all_changed = turn

    def _read(self, unique: int, buffer: bytearray) -> bytes | None:
        number, offset, size = _READ.unpack_from(buffer, m.IN_HEADER.size)
        known = self._contents.get(number)
        if known is None or offset or size < len(known.data):
            return None
        answer = self._answer(unique, self._contents.pop(number, None))
        if answer is not None:
            buffer[QUIET_AT] = 1  # for the access time
        return answer

    def _answer(self, unique: int, known: Known | None) -> bytes | None:
        """What is known as an answer, if it still holds."""
        if known is None or monotonic() > known.until or not self._holds(known):
            return None
        return m.OUT_HEADER.pack(m.OUT_HEADER.size + len(known.data), 0, unique) + known.data

    def _holds(self, known: Known) -> bool:
        return (
            self._changed.get(known.nodeid, self._changed_before) <= known.turn
            and self._all_changed <= known.turn
            and (known.directory or self._files_changed <= known.turn)
        )

    # ---- down

    def failed(self, nodeid: int, number: int, newest: int) -> None:
        """A write that was answered already has failed; ``newest`` is the last handle that was opened before."""
        if len(self._failed) >= REMEMBERED:
            self._failed.clear()
        self._failed[nodeid] = Failure(number, newest, set())
        self._cautious = monotonic() + CAUTIOUS

    def reply(self, unique: int, error: int, message: memoryview, ahead: list[bytes]) -> bytes | memoryview:
        """See the answer to a request in ``asked``, and the ATTRIBUTES messages before it; what the kernel is to get."""
        opcode, nodeid, turn, handle = self.asked.pop(unique)
        for came in ahead:
            self._know(turn, came)
        if opcode in _OPENS:
            if error == 0:
                self._opened(opcode, nodeid, message)
        elif opcode in _SYNCS:
            if opcode == m.FLUSH and nodeid in self.written:
                if len(self._settled) >= REMEMBERED:
                    self._settled.clear()
                self._settled[nodeid] = turn
            if self._failed and (number := self._failure(nodeid, handle)):
                return m.OUT_HEADER.pack(m.OUT_HEADER.size, -number, unique)
        return message

    def _opened(self, opcode: int, nodeid: int, message: memoryview) -> None:
        at = m.OUT_HEADER.size
        if opcode != m.OPEN:
            (nodeid,) = _NODE.unpack_from(message, at)
            at += m.ENTRY_OUT.size
        if opcode == m.CREATE:
            if len(self._new) >= REMEMBERED:
                self._new.clear()
            self._new[nodeid] = monotonic()
        handle, flags, _ = m.OPEN_OUT.unpack_from(message, at)
        if flags & m.FOPEN_DIRECT_IO:
            self._direct.add(handle)
        with self._lock:
            self._opens[nodeid] = self._opens.get(nodeid, 0) + 1

    def _know(self, turn: int, came: bytes) -> None:
        _, code, nodeid, notified = _AHEAD.unpack_from(came)
        known: dict[int, Known]
        if code == ATTRIBUTES:
            known, key, most, data = self._attributes, nodeid, REMEMBERED, came[_AHEAD.size :]
            valid, *fields = m.ATTR_OUT.unpack_from(data)
            fresh, directory = min(valid, FRESH), fields[_MODE_AT - 1] & 0o170000 == 0o040000
        else:
            known, most, data, directory = self._contents, CONTENTS, came[_AHEAD.size + _HANDLE.size :], False
            fresh = FRESH_CONTENT
            (key,) = _HANDLE.unpack_from(came, _AHEAD.size)
        if len(known) >= most:
            known.clear()
        known[key] = Known(nodeid, turn, monotonic() + fresh, directory, data)
        if self.notifications.received > notified:  # something was noticed after it was sent
            known.pop(key, None)

    def notified(self, nodeid: int) -> None:
        """A notification is about to be passed on."""
        self._new.pop(nodeid, None)
        self._attributes.clear()
        self._contents.clear()
