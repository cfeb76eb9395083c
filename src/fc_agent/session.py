"""Serves processes over channels: the server side of docs/architecture.md, "Sessions".

Every session has one thread, which polls the process's output, its stdin, its end, and the client's connection. A thread
more accepts connections and starts processes. Nothing here knows what a process is: a *launcher* turns a request into a
``Process`` (``fc_agent.process`` for programs of this system, ``fc_agent.exec`` for programs in the container).

A session lives on without a client for its ``grace`` (seconds; None: for ever). Then it is abandoned: SIGHUP, and SIGKILL
``HANGUP_TIME`` later; with a grace of 0 SIGKILL at once.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import sys
import termios
import threading
import time
from _thread import start_new_thread
from collections import deque
from typing import Any

from fc_agent import channel as wire
from fc_agent.channel import Channel, ChannelError
from fc_agent.launching import Launcher, LaunchError, Process, Request

__all__ = ["LaunchError", "Launcher", "Process", "Request", "Server", "Session", "serve"]

OPENING_TIME = 10.0  # seconds for a client to say what it wants
HANGUP_TIME = 2.0  # seconds between SIGHUP and SIGKILL
DRAIN_TIME = 0.25  # seconds that a descendant may hold the output open after the process has ended
KEEP_TIME = 30.0  # seconds that a finished session waits for a client that lost its connection, at least


class Session:
    """One process and its channel. ``run`` is the body of its thread; everything else may be called from any thread."""

    def __init__(self, identifier: str, process: Process, grace: float | None) -> None:
        self.identifier = identifier
        self._process = process
        self._grace = grace
        self._channel = Channel()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._arrivals: list[tuple[socket.socket, int | None, bytes]] | None = []  # None: the session is over
        self._poll = select.poll()
        self._polled: dict[int, int] = {}
        self._stdin: deque[tuple[int, memoryview | None]] = deque()  # frame number, data or the end
        self._stdin_open = process.stdin is not None
        self._owed: dict[int, int] | None = None  # after the end: bytes that each output held then
        self._drained = 0.0  # when to stop waiting for more than those
        self._exited = False
        self._alone_since: float | None = time.monotonic()
        self._kill_at: float | None = None
        self._abandoned = False
        self._channel.send(wire.STARTED, json.dumps({"pid": process.pid}).encode())

    def offer(self, connection: socket.socket, received: int | None, rest: bytes) -> bool:
        """Hand over a client that has seen ``received`` frames (None: a new one, it goes on where the last stopped).

        Returns False if the session is over.
        """
        with self._lock:
            if self._arrivals is None:
                return False
            self._arrivals.append((connection, received, rest))
            os.eventfd_write(self._wake, 1)
        return True

    def abandon(self) -> None:
        """Kill the process at once, and end the session: in a clone they are what another VM's client has started."""
        with self._lock:
            if self._arrivals is not None:
                self._abandoned = True
                self._process.kill()
                os.eventfd_write(self._wake, 1)

    def run(self) -> None:
        """Serve until the client has the exit code, or nobody is left to tell."""
        try:
            while not self._over():
                self._step()
        finally:
            with self._lock:
                arrivals, self._arrivals = self._arrivals or [], None
                os.close(self._wake)
            for connection, _, _ in arrivals:
                connection.close()
            self._channel.detach()
            if not self._exited:
                self._process.kill()
            self._process.close()

    def _over(self) -> bool:
        if not self._exited:
            return False
        if self._channel.settled or self._abandoned:
            return True
        return (alone_until := self._alone_until()) is not None and time.monotonic() >= alone_until

    def _alone_until(self) -> float | None:
        """When the patience with an absent client ends; None: there is a client, or no limit, or it has ended."""
        if self._alone_since is None or self._grace is None or self._abandoned:
            return None
        keep = max(self._grace, KEEP_TIME) if self._exited and self._grace else self._grace
        return self._alone_since + keep

    def _step(self) -> None:
        ready = self._wait()
        if self._wake in ready:
            os.eventfd_read(self._wake)
            self._accept()
        if self._process.ended in ready and self._owed is None:
            self._on_end()
        for descriptor in [fd for fd in self._process.outputs if fd in ready]:
            self._pump(descriptor)
        if self._channel.socket is not None:
            try:
                if self._channel.socket.fileno() in ready or self._channel.buffered():
                    self._receive()
                self._feed()
                self._finish()
                self._channel.flush()
            except (ConnectionError, ChannelError):
                self._lose_client()
        else:
            self._feed()
            self._finish()
        self._expire()

    def _wait(self) -> set[int]:
        """Poll for whatever can be dealt with now; returns the descriptors that are ready.

        A descriptor is not just masked but taken out: poll reports a hang-up whether asked or not, and would spin.
        """
        want = {self._wake: select.POLLIN}
        if self._channel.socket is not None:
            want[self._channel.socket.fileno()] = select.POLLIN | (select.POLLOUT if self._channel.wants_write else 0)
        if not self._channel.full:
            want.update(dict.fromkeys(self._process.outputs, select.POLLIN))
        if self._stdin and self._process.stdin is not None:
            want[self._process.stdin] = want.get(self._process.stdin, 0) | select.POLLOUT
        if self._owed is None:
            want[self._process.ended] = select.POLLIN
        for descriptor in [fd for fd in self._polled if fd not in want]:
            self._poll.unregister(descriptor)
            del self._polled[descriptor]
        for descriptor, mask in want.items():
            if self._polled.get(descriptor) != mask:
                self._poll.register(descriptor, mask)
                self._polled[descriptor] = mask
        due = [self._kill_at] if self._kill_at is not None else []
        if self._owed is not None and not self._exited and not self._channel.full:
            due.append(self._drained)
        if (alone_until := self._alone_until()) is not None:
            due.append(alone_until)
        timeout = None if not due else max(0, int((min(due) - time.monotonic()) * 1000) + 1)
        return {fd for fd, _ in self._poll.poll(timeout)}

    def _accept(self) -> None:
        with self._lock:
            arrivals, self._arrivals = self._arrivals or [], []
        if self._abandoned:
            self._hang_up()
        for connection, received, rest in arrivals:
            answer: dict[str, Any] = {"session": self.identifier, "received": self._channel.received}
            if received is None:
                received = answer["from"] = self._channel.acknowledged
            try:
                self._channel.attach(connection, peer_received=received, rest=rest, line=wire.line(answer))
                self._alone_since = None
            except (OSError, ChannelError):
                connection.close()

    def _receive(self) -> bool:
        frames = self._channel.receive()
        for number, (kind, payload) in enumerate(frames, self._channel.received - len(frames) + 1):
            self._on_frame(number, kind, payload)
        return bool(frames)

    def _lose_client(self) -> None:
        """The connection is broken, perhaps while we were writing: its last words may still be there to read."""
        with contextlib.suppress(ConnectionError, ChannelError):
            while self._receive():
                pass
        self._channel.detach()
        self._alone_since = time.monotonic()

    def _on_frame(self, number: int, kind: int, payload: bytes) -> None:
        if kind == wire.STDIN:
            self._stdin.append((number, memoryview(payload)))
        elif kind == wire.STDIN_EOF:
            self._stdin.append((number, None))
        elif kind == wire.RESIZE and len(payload) == wire.SIZE.size:
            self._process.resize(*wire.SIZE.unpack(payload))
        elif kind == wire.SIGNAL and len(payload) == 1:
            self._process.signal(payload[0])
        elif kind == wire.HANGUP:
            self._hang_up()
        else:
            raise ChannelError(f"unexpected frame of type {kind}")

    def _feed(self) -> None:
        """Write to stdin what it takes, and tell the client how far its frames are dealt with."""
        while self._stdin:
            number, data = self._stdin[0]
            if self._stdin_open:
                try:
                    if data is None:
                        self._close_stdin()
                    elif (written := self._process.write(data)) < len(data):
                        self._stdin[0] = (number, data[written:])
                        break
                except BlockingIOError:
                    break
                except OSError:  # nobody reads it any more; the rest of it is for nobody
                    self._close_stdin()
            self._stdin.popleft()
        self._channel.consume(self._stdin[0][0] - 1 if self._stdin else self._channel.received)

    def _close_stdin(self) -> None:
        self._stdin_open = False
        self._process.close_stdin()

    def _pump(self, descriptor: int) -> None:
        pieces = self._process.outputs[descriptor]()
        if pieces is None:
            del self._process.outputs[descriptor]
            return
        for kind, data in pieces:
            self._channel.send(kind, data)
            if self._owed is not None:
                self._owed[descriptor] = self._owed.get(descriptor, 0) - len(data)

    def _on_end(self) -> None:
        """The process is over: what it has written is owed to the client, what its descendants still write is not."""
        self._owed = {fd: _readable(fd) for fd in self._process.outputs}
        self._drained = time.monotonic() + DRAIN_TIME

    def _finish(self) -> None:
        if self._owed is None or self._exited:
            return
        if not self._abandoned:
            open_outputs = self._process.outputs
            if any(self._owed.get(fd, 0) > 0 for fd in open_outputs):
                return
            if open_outputs and time.monotonic() < self._drained:
                return
        self._process.outputs.clear()
        code, message = self._process.exit()
        self._exited = True
        self._channel.send(wire.EXIT, json.dumps({"code": code, **({"message": message} if message else {})}).encode())

    def _hang_up(self) -> None:
        if self._kill_at is None and self._owed is None:
            self._process.signal(signal.SIGHUP)
            self._kill_at = time.monotonic() + HANGUP_TIME

    def _expire(self) -> None:
        now = time.monotonic()
        alone_until = self._alone_until()
        if not self._exited and alone_until is not None and now >= alone_until:
            self._abandoned = True
            self._hang_up()
            if self._grace == 0:
                self._kill_at = now
        if self._kill_at is not None and now >= self._kill_at:
            self._process.kill()
            self._kill_at = None if self._exited else now + HANGUP_TIME


def _readable(descriptor: int) -> int:
    """Bytes that can be read from a pipe or terminal now (FIONREAD)."""
    try:
        return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)
    except OSError:
        return 0


class Server:
    """All sessions of one system."""

    def __init__(self, launcher: Launcher, default_grace: float | None) -> None:
        self._launcher = launcher
        self._default_grace = default_grace
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def serve(self, listener: socket.socket) -> None:
        """Accept clients until ``listener`` is shut down or closed; any stream socket will do."""
        while True:
            try:
                connection, _ = listener.accept()
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if listener.fileno() < 0 or error.errno not in _OUT_OF_RESOURCES:
                    return
                select.select([], [], [], 0.1)  # descriptors or memory: clients that end give some back
                continue
            try:
                start_new_thread(self._greet, (connection,))  # half of what threading's take, and `exec` counts milliseconds
            except RuntimeError:  # there are too many for this system's memory; this client may try again
                connection.close()

    def adopt(self, identifier: str, process: Process, grace: float | None = None) -> Session:
        """Make a session of a process that was started elsewhere; clients resume it by its ``identifier``."""
        session = Session(identifier, process, grace)
        with self._lock:
            self._sessions[identifier] = session
        threading.Thread(target=self._run, args=(session,), daemon=True, name=f"session {identifier}").start()
        return session

    def abandon(self, *, keep: tuple[str, ...] = ()) -> None:
        """End every session but those named: their clients are known not to come back."""
        with self._lock:
            sessions = [s for s in self._sessions.values() if s.identifier not in keep]
        for session in sessions:
            session.abandon()

    def _run(self, session: Session) -> None:
        try:
            session.run()
        except Exception:
            sys.excepthook(*sys.exc_info())  # as traceback.print_exc, which is slow to import
        finally:
            with self._lock:
                if self._sessions.get(session.identifier) is session:
                    del self._sessions[session.identifier]

    def _greet(self, connection: socket.socket) -> None:
        """Read what a client wants and do it; this thread becomes the session's if it opens one."""
        try:
            connection.settimeout(OPENING_TIME)
            try:
                message, rest = wire.read_line(connection)
                self._open(message, connection, rest)
            except LaunchError as error:
                wire.send_line(connection, {"error": {"message": error.message, "code": error.code}})
                connection.close()
        except (OSError, ChannelError):
            connection.close()
        except Exception as error:
            sys.excepthook(*sys.exc_info())
            with contextlib.suppress(OSError):
                wire.send_line(connection, {"error": {"message": f"The agent failed: {error!r}.", "code": 125}})
            connection.close()

    def _open(self, message: dict[str, Any], connection: socket.socket, rest: bytes) -> None:
        if "resume" in message:
            received = message.get("received")
            with self._lock:
                session = self._sessions.get(str(message["resume"]))
            valid = received is None or (isinstance(received, int) and received >= 0)
            if not valid or session is None or not session.offer(connection, received, rest):
                raise LaunchError(f"There is no session {message['resume']}.")
            return
        request = Request.from_json(message["open"]) if isinstance(message.get("open"), dict) else None
        if request is None:
            raise LaunchError("The opening line is neither a request nor a session to resume.")
        grace = self._default_grace if request.grace is None else request.grace
        session = Session(os.urandom(8).hex(), self._launcher(request), grace)
        with self._lock:
            self._sessions[session.identifier] = session
        session.offer(connection, 0, rest)
        self._run(session)


_OUT_OF_RESOURCES = (12, 23, 24, 105)  # ENOMEM, ENFILE, EMFILE, ENOBUFS


def serve(listener: socket.socket, *, launcher: Launcher, default_grace: float | None) -> None:
    """Serve sessions on ``listener`` (Unix or vsock, stream, listening) until it is shut down.

    Arguments:
        launcher: starts the process for a request, or raises LaunchError.
        default_grace: seconds that a session waits for its client to come back, if the client does not say; 0 kills
            the process as soon as the client is gone, None waits for ever.
    """
    Server(launcher, default_grace).serve(listener)
