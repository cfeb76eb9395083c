"""What a server would lose if it were killed, written down after each request and before its answer goes out.

One file for each mount: ``marshal`` records, appended. A server that starts with the same directory of journals goes on
where the killed one was: the nodes, open files and locks that the kernel knows, the requests that take long and had no
answer, and the answers to requests that changed something, so that such a request that is sent again is not done again.
Only a request that the kill itself interrupted, one of each thread, may be done twice.

The file is rewritten from a full state when it has grown to twice of that; it is read by the same version of Python that wrote it.
"""

import base64
import contextlib
import logging
import marshal
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

from fuse_pipe.messages import IN_HEADER
from fuse_pipe.records import set_range

REWRITE = 16 << 20  # bytes that a journal may have; more where twice the state has more
REWRITE_AGAIN = 10.0  # seconds from one attempt to the next
ANSWERS = 2048  # answers kept for requests that are sent again

log = logging.getLogger("fuse_pipe")

Record = tuple[Any, ...]


class Journal:
    """The journal of one mount. Records are tuples; the first item says which, see ``Replay``.

    One that cannot be written (the disk is full) is emptied, because a part of it would be untrue, until ``rewrite`` succeeds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        self.lost = False
        self._size = 0
        self._most = REWRITE  # bytes that it may have
        self._next = 0.0  # when it may be rewritten again
        self._answers: deque[Record] = deque(maxlen=ANSWERS)  # the last ones: the other side may not have them yet
        self._lock = threading.Lock()
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.add = self.records.append

    def answer(self, unique: int, answer: bytes) -> None:
        """Note that a request was done, and what to say if it is sent again."""
        record = ("answer", unique, answer)
        self._answers.append(record)
        self.add(record)

    def flush(self) -> None:
        """Write what was added. It is in the kernel then, where the end of this process does not touch it."""
        if self.records:
            with self._lock:
                self._write_added()

    def _write_added(self) -> None:
        count = len(self.records)
        if not self.lost:
            data = b"".join(map(marshal.dumps, self.records[:count]))
            try:
                _write(self._fd, data)
                self._size += len(data)
            except OSError as error:
                log.warning("%s: %s; what is open is lost if this process is killed", self.path, error.strerror)
                self.lost = True
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, 0)
        del self.records[:count]  # only now: a thread that finds nothing here answers

    def outgrown(self) -> bool:
        """Whether to rewrite it now: it is much larger than it need be, or was lost. Not said again for some time."""
        if not (self.lost or self._size > self._most) or (now := monotonic()) < self._next:
            return False
        self._next = now + REWRITE_AGAIN
        return True

    def rewrite(self, make_state: Callable[[], dict[str, Any]]) -> None:
        """Begin anew from a full state and the last answers. ``make_state`` must not flush.

        Only locks and the ends of requests may be added meanwhile: whether the state has them or not, they are written behind it.

        Raises:
            OSError: it cannot be written; the journal is what it was.
        """
        with self._lock:
            if self._fd < 0:
                return
            self._write_added()  # the state has it, and references to a node must not be counted twice
            state = make_state()
            new = self.path.with_suffix(".new")
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                data = b"".join(map(marshal.dumps, [("state", state), *self._answers]))
                _write(fd, data)
                os.rename(new, self.path)
            except OSError:
                os.close(fd)
                with contextlib.suppress(OSError):
                    new.unlink()
                raise
            os.close(self._fd)
            self._fd, self._size, self.lost = fd, len(data), False
            self._most = max(REWRITE, 2 * len(data))

    def close(self, *, remove: bool) -> None:
        """Close the file, which nothing is written to any more; with ``remove`` the mount is over and the file goes."""
        with self._lock:
            os.close(self._fd)
            self._fd, self.lost = -1, True
            if remove:
                with contextlib.suppress(FileNotFoundError):
                    self.path.unlink()


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Replay:
    """Turns a journal into a state of the form that ``state.restore`` takes."""

    def __init__(self) -> None:
        self.nodes: dict[int, list[Any]] = {}
        self.names: dict[tuple[int, str], int] = {}
        self.handles: dict[int, list[Any]] = {}
        self.locks: dict[tuple[int, int], list[Any]] = {}
        self.volume: dict[str, Any] = {"flags": 0, "minor": 0, "next_handle": 0}
        self.answers: OrderedDict[int, bytes] = OrderedDict()
        self.waiting: dict[int, list[Any]] = {}  # unique -> channel and request, of what takes long

    def read(self, path: Path) -> None:
        """Take in a journal; one that ends in the middle of a record is taken up to there, and cut there."""
        whole = 0
        with path.open("rb") as file, contextlib.suppress(EOFError, ValueError, TypeError):
            while True:
                kind, *fields = marshal.load(file)
                getattr(self, "_" + kind)(*fields)
                whole = file.tell()
        os.truncate(path, whole)

    def state(self, name: str) -> dict[str, Any]:
        """The saved session."""
        return {
            "name": name,
            "channels": [],
            "waiting": list(self.waiting.values()),
            "answers": [[unique, _text(answer)] for unique, answer in self.answers.items()],
            "volume": {
                **self.volume,
                "nodes": list(self.nodes.values()),
                "names": [[directory, name, child] for (directory, name), child in self.names.items()],
                "handles": list(self.handles.values()),
                "locks": [[node, owner, pid, held] for (node, owner), (pid, held) in self.locks.items() if held],
            },
        }

    def _state(self, state: dict[str, Any]) -> None:
        volume = state["volume"]
        self.nodes = {node[0]: list(node) for node in volume["nodes"]}
        self.names = {(directory, name): child for directory, name, child in volume["names"]}
        self.handles = {handle[0]: list(handle) for handle in volume["handles"]}
        self.locks = {(node, owner): [pid, [tuple(r) for r in held]] for node, owner, pid, held in volume["locks"]}
        self.volume = {key: volume[key] for key in ("flags", "minor", "next_handle")}
        self.waiting = {
            IN_HEADER.unpack_from(base64.b64decode(message))[2]: [number, message] for number, message in state["waiting"]
        }

    def _slow(self, unique: int, number: int, message: bytes) -> None:
        self.waiting[unique] = [number, _text(message)]

    def _done(self, unique: int) -> None:
        self.waiting.pop(unique, None)

    def _init(self, flags: int, minor: int) -> None:
        self.volume.update(flags=flags, minor=minor)

    def _learn(self, id: int, parent: int, name: bytes, kind: int, dev: int, ino: int) -> None:
        text = _text(name)
        node = self.nodes.setdefault(id, [id, 0, "", kind, dev, ino, 0, None, None])
        node[6] += 1
        if parent:
            node[1], node[2] = parent, text
            self.names[(parent, text)] = id

    def _missing(self, parent: int, name: bytes) -> None:
        self.names[(parent, _text(name))] = 0

    def _forget(self, id: int, count: int) -> None:
        node = self.nodes.get(id)
        if node is not None:
            node[6] -= count
            if node[6] <= 0:
                del self.nodes[id]

    def _unname(self, parent: int, name: bytes) -> None:
        text = _text(name)
        node = self.nodes.get(self.names.pop((parent, text), 0))
        if node is not None and node[1:3] == [parent, text]:
            node[1], node[2] = 0, ""

    def _rename(self, parent: int, name: bytes, to: int, new: bytes, exchange: bool) -> None:
        old_key, new_key = (parent, _text(name)), (to, _text(new))
        moved, other = self.names.pop(old_key, 0), self.names.pop(new_key, 0)
        for id, key in ((other, old_key if exchange else (0, "")), (moved, new_key)):
            if id in self.nodes:
                self.nodes[id][1], self.nodes[id][2] = key
        if exchange and other:
            self.names[old_key] = other
        if moved:
            self.names[new_key] = moved

    def _open(self, number: int, node: int, flags: int) -> None:
        self.handles[number] = [number, node, flags, 2, []]  # 2: F_UNLCK
        self.volume["next_handle"] = max(number, self.volume["next_handle"])

    def _close(self, number: int) -> None:
        self.handles.pop(number, None)

    def _flock(self, number: int, kind: int) -> None:
        if number in self.handles:
            self.handles[number][3] = kind

    def _owner(self, number: int, owner: int) -> None:
        if number in self.handles and owner not in self.handles[number][4]:
            self.handles[number][4].append(owner)

    def _disown(self, number: int, owner: int) -> None:
        if number in self.handles and owner in self.handles[number][4]:
            self.handles[number][4].remove(owner)

    def _lock(self, node: int, owner: int, pid: int, start: int, end: int, kind: int) -> None:
        entry = self.locks.setdefault((node, owner), [pid, []])
        entry[1] = set_range(entry[1], start, end, kind)

    def _unlock(self, node: int, owner: int) -> None:
        self.locks.pop((node, owner), None)

    def _answer(self, unique: int, answer: bytes) -> None:
        self.answers[unique] = answer
        if len(self.answers) > ANSWERS:
            self.answers.popitem(last=False)
