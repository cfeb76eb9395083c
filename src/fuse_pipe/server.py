"""The host's side: serves a directory to any number of mounts over stream sockets."""

import contextlib
import errno
import logging
import os
import re
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuse_pipe import linux
from fuse_pipe import messages as m
from fuse_pipe.channel import (
    HELLO_MOST,
    KEPT_BYTES,
    LARGE,
    NOTIFY,
    PROTOCOL,
    Buffers,
    Channel,
    Reader,
    receive_hello,
    send_hello,
    tune,
)
from fuse_pipe.errors import ConnectionLost, FusePipeError, ProtocolError
from fuse_pipe.journal import Journal, Replay
from fuse_pipe.session import WAKE, Session
from fuse_pipe.state import VERSION, restore, rewrite_journal, save
from fuse_pipe.volume import Volume
from fuse_pipe.worker import this_worker

log = logging.getLogger("fuse_pipe")

CONNECTIONS = 256  # at a time
SESSIONS = 8  # mounts at a time; the oldest without a connection gives way
BATCH = 64  # answers that are sent together
UNSAID = 512  # messages taken in before the relay is told; fewer than the answers that a journal keeps
KEPT_SHARE = 256 * 1024  # bytes that a channel may keep for a relay without a look at what all of them keep


class Server:
    """Serves ``root``; see ``Volume`` for the other arguments. One thread for each connection.

    Make it in the main thread: it installs the handler of the signal that ends a wait for a lock.
    """

    def __init__(
        self,
        root: str,
        *,
        read_only: bool = False,
        owner: tuple[int, int] = (0, 0),
        watch: bool = True,
        writeback: bool = False,
        state: dict[str, Any] | None = None,
        journals: str | None = None,
    ) -> None:
        """
        Arguments:
            state: what ``save`` of another server gave, to take over its mounts.
            journals: a directory to keep journals in; the mounts of a killed server that kept them there are taken
            over, and of ``state`` only those that are not among them.
        """
        linux.keep_memory()
        self.root = root
        self.options: dict[str, Any] = {"read_only": read_only, "owner": owner, "watch": watch, "writeback": writeback}
        self.sessions: dict[str, Session] = {}
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        if threading.current_thread() is threading.main_thread():
            signal.signal(WAKE, lambda *_: None)
        try:
            self.kind = "directory" if stat.S_ISDIR(os.stat(root).st_mode) else "file"
        except OSError:
            self.kind = "directory"  # gone: everything in it fails with EIO
        self.journals = Path(journals) if journals is not None else None
        if self.journals is not None:
            self.journals.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._replay(self.journals)
        if state is not None:
            self._take_over(state)

    def _replay(self, journals: Path) -> None:
        for path in sorted(journals.glob("*.journal")):
            replay = Replay()
            replay.read(path)
            if not replay.nodes:  # it was lost; a state that is older than it does not hold
                self.session(path.stem)
                continue
            self._take_over({"version": VERSION, "sessions": [replay.state(path.stem)]})

    def _take_over(self, state: dict[str, Any]) -> None:
        """Go on with the mounts of a saved state, but those that journals know better."""
        new = [saved for saved in state.get("sessions", ()) if saved.get("name") not in self.sessions]
        restore(self, {**state, "sessions": new})
        for saved in new:
            rewrite_journal(self.sessions[saved["name"]])

    def session(self, name: str) -> Session:
        """The mount of this name, made when it is first heard of."""
        with self.lock:
            session = self.sessions.get(name)
            if session is None or session.ended:
                if session is not None:
                    session.close()
                while len(self.sessions) >= SESSIONS:
                    idle = next(
                        (s for s in self.sessions.values() if not any(c.sock for c in s.channels.values())), None
                    )
                    if idle is None:
                        raise ProtocolError("too many mounts")
                    del self.sessions[idle.name]
                    idle.ended = True
                    idle.close()
                session = self.sessions[name] = Session(name, Volume(self.root, **self.options))
                if self.journals is not None:
                    session.volume.write_journal(Journal(self.journals / f"{name}.journal"))
            return session

    def connection(self, sock: socket.socket) -> None:
        """Serve one connection to its end; whatever comes over it, only it ends."""
        with self.lock:
            self.connections.add(sock)
        try:
            tune(sock)
            self._serve(sock)
        except ConnectionLost:
            pass
        except FusePipeError as error:
            log.info("connection closed: %s", error)
        except Exception:
            log.exception("connection closed")
        finally:
            with self.lock:
                self.connections.discard(sock)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _serve(self, sock: socket.socket) -> None:
        try:
            session, channel, base, received = self._greeted(sock)
        except ProtocolError as error:
            with contextlib.suppress(OSError):
                send_hello(sock, {"error": str(error)[: HELLO_MOST // 2]})
            raise
        with channel.lock:
            older = channel.sock
        if older is not None:
            with contextlib.suppress(OSError):
                older.shutdown(socket.SHUT_RDWR)
        with channel.serving:  # an older connection of this channel ends first
            self._carry(session, channel, sock, base, received)
        if session.ended:
            with self.lock:
                if self.sessions.get(session.name) is session:
                    del self.sessions[session.name]
                    session.close()

    def _greeted(self, sock: socket.socket) -> tuple[Session, Channel, int, int]:
        """Read the relay's hello: its session and channel, and what it has sent and received."""
        hello = receive_hello(sock)
        name, number, base, received = (hello.get(key) for key in ("session", "channel", "base", "received"))
        if not (
            isinstance(name, str)
            and re.fullmatch("[0-9a-z]{1,64}", name)
            and type(number) is type(base) is type(received) is int
            and 0 <= base < 1 << 63
            and 0 <= received < 1 << 63
        ):
            raise ProtocolError("a hello without its fields")
        session = self.session(name)
        session.quiet = hello.get("quiet") is True
        return session, session.channel(number), base, received

    def _carry(self, session: Session, channel: Channel, sock: socket.socket, base: int, received: int) -> None:
        fresh = not channel.known
        if fresh:  # nothing is known of this channel: the relay sends all that has no answer
            channel.received, channel.base = base, received
        if not base <= channel.received or not channel.base <= received <= channel.base + len(channel.unacked):
            send_hello(sock, {"error": "messages are missing"})
            raise ProtocolError("messages are missing")
        send_hello(
            sock,
            {
                "fuse_pipe": PROTOCOL, "kind": self.kind, "read_only": self.options["read_only"],
                "received": None if fresh else channel.received, "quiet": True,
            },
        )  # fmt: skip
        channel.attach(sock, received)
        session.make_up(channel)
        try:
            self._loop(session, channel, sock)
        finally:
            channel.detach(sock)

    def _loop(self, session: Session, channel: Channel, sock: socket.socket) -> None:
        worker = this_worker()
        reader = Reader(sock, m.IN_HEADER.size, m.MAX_REQUEST)
        handle, following = session.handle, reader.next
        message: memoryview | None = None
        while not session.ended:
            if message is None:
                reader.more()
            if channel.kept > KEPT_SHARE:
                self._bound()
            replies: list[Buffers] = []
            most = channel.received + UNSAID
            try:
                with session.gate:
                    try:
                        while (message := following()) is not None:
                            handle(channel, worker, message, replies)
                            if replies and (len(replies) >= BATCH or len(replies[-1][-1]) > LARGE):
                                break  # requests are small: all that have come may ask for more than there is memory
                            if channel.received >= most:
                                break
                    finally:
                        channel.leaving = replies
                        if (journal := session.volume.journal) is not None:
                            journal.flush()
                            if journal.outgrown():
                                with contextlib.suppress(RuntimeError):  # no room for a thread: another time
                                    threading.Thread(target=rewrite_journal, args=(session,), daemon=True).start()
            finally:
                if replies or channel.number == NOTIFY:
                    channel.send(replies)
                elif channel.overdue():
                    channel.send(())
            session.make_up(channel)

    def _bound(self) -> None:
        """See that all channels together do not keep too much.

        Raises:
            ProtocolError: they do; it stays so until some of it is acknowledged.
        """
        with self.lock:
            sessions = list(self.sessions.values())
        if sum(channel.kept for session in sessions for channel in list(session.channels.values())) > KEPT_BYTES:
            raise ProtocolError("nothing is acknowledged")

    def save(self) -> dict[str, Any]:
        """The state of all mounts as JSON values, for ``Server(state=...)``; see ``state``."""
        return save(self)

    def accept(self, listener: socket.socket) -> None:
        """Serve every connection to ``listener``, until it is shut down."""
        while True:
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EINVAL):
                    return
                threading.Event().wait(0.1)  # no descriptors, no memory: they may come back
                continue
            if len(self.connections) >= CONNECTIONS:
                sock.close()
                continue
            try:
                threading.Thread(target=self.connection, args=(sock,), name="fuse_pipe connection", daemon=True).start()
            except RuntimeError:  # this host has no room for a thread: the relay tries again
                sock.close()

    def close(self) -> None:
        """End every connection and mount."""
        with self.lock:
            connections, sessions = list(self.connections), list(self.sessions.values())
            self.sessions.clear()
        for session in sessions:
            session.close()
        for sock in connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def _make_room(path: str) -> None:
    """Remove the socket of a server that is gone."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FusePipeError(f"{path} is there already and is not a socket; name another path")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
            probe.setblocking(False)
            probe.connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        os.unlink(path)
        return
    except BlockingIOError:  # a server that is busy
        pass
    raise FusePipeError(f"a server listens on {path} already; end it, or name another path")


@contextlib.contextmanager
def listening(path: str) -> Iterator[socket.socket]:
    """A Unix socket at ``path``, that only this user can connect to; one that nobody listens on is replaced.

    Raises:
        FusePipeError: something else is there.
    """
    _make_room(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(mask)
    try:
        listener.listen(64)
        yield listener
    finally:
        listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def serve(listener: socket.socket, root: str, **options: Any) -> None:
    """Serve ``root`` to whoever connects to ``listener``, until it is shut down; the options are ``Server``'s."""
    server = Server(root, **options)
    try:
        server.accept(listener)
    finally:
        server.close()
