"""A server's state as plain JSON values, so that another server goes on with its mounts: a clone's, or a restarted one.

It holds no paths of the host: nodes are named within the served directory, and found again there by name or, for root,
by file handle. What is not found again gives ESTALE, on which the kernel looks the name up anew.
"""

import base64
import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fuse_pipe import linux, locking
from fuse_pipe import messages as m
from fuse_pipe.channel import Channel
from fuse_pipe.errors import FusePipeError
from fuse_pipe.files import OPEN_FLAGS
from fuse_pipe.nodes import Node
from fuse_pipe.session import Session
from fuse_pipe.volume import Handle, Volume

if TYPE_CHECKING:
    from fuse_pipe.server import Server

VERSION = 1
_NOT_REOPENED = os.O_CREAT | os.O_EXCL | os.O_TRUNC


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


# ---- saving


def save(server: "Server") -> dict[str, Any]:
    """The state of all mounts, at a moment when no request is half done; requests go on afterwards.

    A request that waits for a lock is part of the state: the server that takes over waits on.
    """
    with server.lock:
        sessions = [session for session in server.sessions.values() if not session.ended]
    return {"version": VERSION, "sessions": [save_session(session) for session in sessions]}


def rewrite_journal(session: Session) -> None:
    """Have the journal of a mount begin anew, if it has one and there is room."""
    with contextlib.suppress(OSError), _still(session):
        if session.volume.journal is not None:
            session.volume.journal.rewrite(lambda: _save_session(session))


def save_session(session: Session) -> dict[str, Any]:
    """The state of one mount."""
    with _still(session):
        return _save_session(session)


@contextlib.contextmanager
def _still(session: Session) -> Iterator[None]:
    """No request is under way but those that wait for locks, which may get them meanwhile."""
    session.gate.close()
    try:
        session.drain()
        yield
    finally:
        session.gate.open()


def _save_session(session: Session) -> dict[str, Any]:
    with session.lock:
        waiting = [[channel, _text(message)] for channel, message in session.slow.values()]
        interrupted = list(session.interrupted)
        channels = [  # after those, whose answers may just be on their way
            [
                c.number,
                c.received,
                c.base,
                [_text(b"".join(bytes(part) for part in message)) for message in c.unknown()],
            ]
            for c in session.channels.values()
        ]
    return {
        "name": session.name,
        "channels": channels,
        "waiting": waiting,
        "interrupted": interrupted,
        "answers": [[unique, _text(answer)] for unique, answer in list(session.answers.items())],
        "volume": _save_volume(session.volume),
    }


def _save_volume(volume: Volume) -> dict[str, Any]:
    nodes, names = [], []
    if volume.nodes is not None:
        for node in volume.nodes.nodes():
            nodes.append(
                [
                    node.id,
                    node.parent.id if node.parent is not None else 0,
                    _text(node.name),
                    node.kind,
                    node.dev,
                    node.ino,
                    node.lookups,
                    _handle_of(volume, node),
                    list(node.told) if node.told else None,
                ]
            )
            names += [
                [node.id, _text(name), child.id if child is not None else 0]
                for name, child in list(node.children.items())
            ]
    with volume.lock:
        handles = [[number, h.node.id, h.flags, h.flock, sorted(h.owners)] for number, h in volume.handles.items()]
    with volume.records.lock:
        locks = [
            [node, number, owner.pid, owner.held]
            for node, owners in volume.records.nodes.items()
            for number, owner in owners.items()
        ]
    return {
        "flags": volume.flags,
        "minor": volume.minor,
        "nodes": nodes,
        "names": names,
        "handles": handles,
        "locks": locks,
        "next_handle": volume.next_handle,
    }


def _handle_of(volume: Volume, node: Node) -> str | None:
    """A file handle where the name alone may not do: for files that are open, or have none."""
    if (
        node.handle is None
        and node.fd is not None
        and (node.opens or node.parent is None)
        and volume.table.mount_fd() is not None
    ):
        with contextlib.suppress(OSError):
            return _text(linux.file_handle(node.fd.n))
    return _text(node.handle) if node.handle is not None else None


# ---- restoring


def restore(server: "Server", state: dict[str, Any]) -> None:
    """Take over the mounts of a saved state.

    Raises:
        FusePipeError: it is not a state that this version can read.
    """
    if state.get("version") != VERSION:
        raise FusePipeError(f"a state of version {state.get('version')} cannot be read, only of version {VERSION}")
    try:
        for saved in state["sessions"]:
            session = server.session(saved["name"])
            _restore_volume(session.volume, saved["volume"])
            for number, received, base, unacked in saved["channels"]:
                channel = session.channel(number)
                channel.known, channel.received, channel.base = True, received, base
                channel.unacked.extend((_bytes(message),) for message in unacked)
                channel.kept = sum(len(message[0]) for message in channel.unacked)
            for unique, answer in saved.get("answers", ()):
                session.answers[unique] = _bytes(answer)
                if session.volume.journal is not None:
                    session.volume.journal.answer(unique, session.answers[unique])
            for unique in saved.get("interrupted", ()):
                session.interrupt(unique)
            for number, message in saved["waiting"]:
                _wait_again(session, session.channel(number), _bytes(message))
            if session.volume.watcher is not None:  # what changed while nobody looked
                session.volume.watcher.check_all()
    except (KeyError, TypeError, ValueError) as error:
        raise FusePipeError(f"the state is damaged: {error!r}") from error


def _wait_again(session: Session, channel: Channel, message: bytes) -> None:
    unique = m.IN_HEADER.unpack_from(message)[2]
    if unique in session.answers:  # done before the kill, but perhaps not answered
        channel.send(((session.answers[unique],),))
    else:
        session.again.add(unique)
        session.defer(channel, unique, message)


def _restore_volume(volume: Volume, saved: dict[str, Any]) -> None:
    volume.flags, volume.minor = saved["flags"], saved["minor"]
    volume.next_handle = max(volume.next_handle, saved["next_handle"])
    volume.decoders = m.decoders(bool(volume.flags & m.SETXATTR_EXT))
    volume.broken.update(number for number, *_ in saved["handles"])
    if volume.nodes is None:  # the directory is gone: EIO for everything
        return
    table = volume.nodes
    nodes: dict[int, Node] = {table.root.id: table.root}
    # A file system that was mounted again may have another number.
    root_dev = next((dev for id, _, _, _, dev, *_ in saved["nodes"] if id == table.root.id), table.root.dev)
    with table.lock:
        for id, _, _, kind, dev, ino, lookups, handle, told in saved["nodes"]:
            if id != table.root.id:
                node = nodes[id] = Node(id, kind, table.root.dev if dev == root_dev else dev, ino)
                node.lookups = lookups
                table.by_id[id] = table.by_key[(node.dev, node.ino)] = node
            node = nodes[id]
            node.handle = _bytes(handle) if handle is not None else None
            node.told = tuple(told) if told is not None else None
        for id, parent, name, *_ in saved["nodes"]:
            if parent in nodes and id != table.root.id:
                nodes[id].parent, nodes[id].name = nodes[parent], _bytes(name)
    for directory, name, child in saved["names"]:
        if directory in nodes and (child == 0 or child in nodes):
            table.believe(nodes[directory], _bytes(name), nodes[child] if child else None)
    for directory in {directory for directory, *_ in saved["names"] if directory in nodes}:
        with contextlib.suppress(OSError):
            volume.watch(nodes[directory])
    _restore_handles(volume, saved, nodes)
    for number, owner, pid, held in saved["locks"]:
        if number in nodes:
            with contextlib.suppress(OSError):  # lost to somebody else meanwhile, or still held by who was cloned
                known = volume.records.add(number, owner, locking.lock_fd(volume, nodes[number]), pid)
                for start, end, kind in held:
                    volume.records.set(number, owner, known, kind, start, end, False)


def _restore_handles(volume: Volume, saved: dict[str, Any], nodes: dict[int, Node]) -> None:
    for number, id, flags, flock, owners in saved["handles"]:
        node = nodes.get(id)
        if node is None:
            continue
        try:
            path = volume.table.fd(node)
            fd = volume.reopen(path, _reopen_flags(volume, node, flags))
        except OSError as error:
            if error.errno not in (
                errno.ESTALE,
                errno.ENOENT,
                errno.EACCES,
                errno.EPERM,
                errno.EROFS,
                errno.ETXTBSY,
                errno.EIO,
            ):
                raise
            continue
        handle = Handle(node, fd, flags)
        handle.owners = set(owners)
        volume.handles[number] = handle
        volume.broken.discard(number)
        node.opens += 1
        node.fd = path
        if flock != fcntl.F_UNLCK:
            with contextlib.suppress(OSError):  # lost to somebody else meanwhile, or still held by who was cloned
                locking.flock(volume, number, handle, flock, False)


def _reopen_flags(volume: Volume, node: Node, flags: int) -> int:
    if node.kind == stat.S_IFDIR:
        return os.O_RDONLY | os.O_DIRECTORY
    wanted = flags & OPEN_FLAGS & ~_NOT_REOPENED
    if volume.writeback and wanted & os.O_ACCMODE == os.O_WRONLY:
        wanted = wanted & ~os.O_ACCMODE | os.O_RDWR
    return wanted
