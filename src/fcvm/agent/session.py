"""The client of a session: docs/architecture.md, "Sessions".

``stream`` runs one to its end and is all that most callers need. It is used by `fcvm exec`, by the supervisor of a VM for
the container's own output, and by the forwarder to the machine. `fcvm exec` counts milliseconds, so this module imports
little.
"""

from __future__ import annotations

import os
import select
import time
from _thread import get_ident  # threading is slow to import

from fc_agent import channel as wire
from fc_agent.channel import Channel, ChannelError
from fc_agent.jsontext import loads
from fcvm.agent import opening
from fcvm.agent.opening import Request
from fcvm.agent.vsock import Resets
from fcvm.errors import AgentError
from fcvm.signals import FORWARDED, handled

__all__ = ["FORWARDED", "Client", "Exit", "Request", "Resume", "stream", "to_descriptors"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from _socket import socket
    from collections import deque
    from collections.abc import Callable, Sequence

    Connect = Callable[[], socket]
    Output = Callable[[str, bytes], None]
else:
    import _signal as signal
    from _collections import deque  # what `collections` has it from

OPENING_TIME = 30.0  # seconds that the server may take to find a session
FAREWELL_TIME = 1.0  # seconds to tell the server that we give up
PATIENCE = 30.0  # seconds to look for a server that we had a connection to
SHORT = 0.25  # seconds of silence in which most sessions end; only longer ones need to look for resets


class Resume:
    """Attach to a session that exists (``main`` is the container's own), as a new client: where the last one stopped."""

    def __init__(self, session: str, on_resumed: Callable[[int], None] = lambda seen: None) -> None:
        """
        Arguments:
            on_resumed: called before any output, with the number of frames that the last client has had.
        """
        self.session = session
        self.on_resumed = on_resumed


class Exit:
    """How a process ended: its exit code (128+N for signal N), and a message if it never ran."""

    __slots__ = ("code", "message")

    def __init__(self, code: int, message: str | None = None) -> None:
        self.code = code
        self.message = message

    def __repr__(self) -> str:
        return f"Exit({self.code}, {self.message!r})"


def give_up(error: BaseException, since: float) -> bool:
    """The usual answer to a failed reconnect: nobody listens any more, or it has taken ``PATIENCE`` seconds."""
    return isinstance(error, FileNotFoundError | ConnectionRefusedError) or since > PATIENCE


class Client:
    """One session. ``run`` belongs to one thread; ``signal``, ``resize`` and ``hang_up`` may be called from any."""

    def __init__(
        self,
        connect: Connect,
        request: Request | Resume,
        *,
        stdin: int | None,
        on_output: Output,
        on_started: Callable[[int], None] | None = None,
        give_up: Callable[[BaseException, float], bool] = give_up,
        resets: Resets | None = None,
        opened: socket | None = None,
    ) -> None:
        self._resets = resets
        self._opened = opened
        self._connect = connect
        self._request = request
        self._stdin = stdin
        self._on_output = on_output
        self._on_started = on_started
        self._give_up = give_up
        self._channel = Channel()
        self._session = ""
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._queue: deque[tuple[int, bytes]] = deque()  # control frames from other threads and signal handlers
        self._printing = False  # in on_output, which may block: a signal handler may use the channel itself
        self._thread = 0

    def signal(self, number: int) -> None:
        """Send a signal to the process."""
        self._post(wire.SIGNAL, bytes((number,)))

    def resize(self, rows: int, columns: int) -> None:
        """Tell the process's terminal its size."""
        self._post(wire.RESIZE, wire.SIZE.pack(min(rows, 65535), min(columns, 65535)))

    def hang_up(self) -> None:
        """End the process: SIGHUP, soon SIGKILL."""
        self._post(wire.HANGUP, b"")

    def _post(self, kind: int, payload: bytes) -> None:
        self._queue.append((kind, payload))
        if self._printing and get_ident() == self._thread:  # we are a signal handler that interrupted a blocked write
            self._printing = False
            self._before_printing()
        else:
            try:
                os.eventfd_write(self._wake, 1)
            except (OSError, ValueError):
                pass

    def _before_printing(self) -> None:
        """Send what is queued; whatever comes afterwards finds ``_printing`` set and is sent by its handler.

        Handlers run between any two instructions, so the flag is set before the last look at the queue.
        """
        while True:
            self._printing = True
            if not self._queue:
                return
            self._printing = False
            self._send_queue()
            try:
                self._channel.flush()
            except ConnectionError:  # there are frames to deal with first; the next flush says it again
                pass

    def _send_queue(self) -> None:
        while self._queue:
            self._channel.send(*self._queue.popleft())

    def run(self) -> Exit:
        """Run the session to its end.

        Raises:
            AgentError: the server is gone, or does not speak the protocol.
            OSError: the first ``connect`` failed, or ``on_output`` did (BrokenPipeError); the process is hung up then.
        """
        self._thread = get_ident()
        try:
            refused = self._open()
            if refused is not None:
                return refused
            while True:
                try:
                    ended = self._step()
                except ConnectionError as error:
                    if self._printing:  # it was our own output that broke
                        raise
                    self._reconnect(error)
                    continue
                if ended is not None:
                    return ended
        except ChannelError as error:
            raise AgentError(f"The agent broke the session's protocol: {error}.") from error
        except BaseException:
            self._say_farewell()
            raise
        finally:
            self._channel.detach()
            wake, self._wake = self._wake, -1  # a late signal is not to be written to what gets this number next
            os.close(wake)
            if self._resets is not None:
                self._resets.close()

    def _open(self) -> Exit | None:
        if isinstance(self._request, Request):
            connection, answer, rest = self._launch(self._request)
        else:
            message: dict[str, object] = {"resume": self._request.session, "received": None}
            connection = self._connect()
            try:
                answer, rest = self._ask(connection, message)
            except OSError as error:
                connection.close()
                connection, answer, rest = self._ask_again(message, error)
        if "error" in answer:
            connection.close()
            error_ = answer["error"] if isinstance(answer["error"], dict) else {}
            code = error_.get("code")
            return Exit(code if isinstance(code, int) else 125, str(error_.get("message") or "The agent refused."))
        self._session = str(answer.get("session"))
        # A new client of an old session takes over its predecessor's place in both directions.
        self._channel = Channel(sent=_count(answer, "received"), received=_count(answer, "from"))
        self._channel.attach(connection, peer_received=_count(answer, "received"), rest=rest)
        if isinstance(self._request, Resume):
            self._request.on_resumed(_count(answer, "from"))
        return None

    def _launch(self, request: Request) -> tuple[socket, dict[str, object], bytes]:
        """Ask for a process, unless that was done, and read the answer."""
        connection = self._opened or self._connect()
        if self._opened is None:
            opening.send(connection, request)
        try:
            return connection, *wire.read_line(connection)
        except OSError as error:
            connection.close()
            raise opening.no_answer(error) from error

    def _ask(self, connection: socket, message: dict[str, object]) -> tuple[dict[str, object], bytes]:
        connection.settimeout(OPENING_TIME)
        wire.send_line(connection, message)
        return wire.read_line(connection)

    def _reconnect(self, error: BaseException) -> None:
        self._channel.detach()
        message: dict[str, object] = {"resume": self._session, "received": self._channel.received}
        connection, answer, rest = self._ask_again(message, error)
        if "error" in answer:
            connection.close()
            raise AgentError("The session is gone: the connection was lost for too long, or the agent restarted.")
        self._channel.attach(connection, peer_received=_count(answer, "received"), rest=rest)

    def _ask_again(self, message: dict[str, object], error: BaseException) -> tuple[socket, dict[str, object], bytes]:
        """Ask over new connections until there is an answer, as the one before has broken by ``error``."""
        since = time.monotonic()
        pause = 0.005
        while True:
            connection = None
            try:
                connection = self._connect()
                return connection, *self._ask(connection, message)
            except (OSError, AgentError, ChannelError) as failure:
                if connection is not None:
                    connection.close()
                if self._give_up(failure, time.monotonic() - since):
                    raise AgentError(f"The connection to the agent was lost: {error}.") from failure
                time.sleep(pause)  # nothing tells when a listener comes back
                pause = min(pause * 2, 0.25)

    def _step(self) -> Exit | None:
        self._send_queue()
        self._channel.flush()
        connection = self._channel.socket
        assert connection is not None
        if not self._channel.buffered():
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            poll.register(connection, select.POLLIN | (select.POLLOUT if self._channel.wants_write else 0))
            if self._stdin is not None and not self._channel.full:
                poll.register(self._stdin, select.POLLIN)
            ready = self._await(poll)
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if self._stdin in ready:
                self._read_stdin()
            if connection.fileno() not in ready:
                return None
        frames = self._channel.receive()
        for number, (kind, payload) in enumerate(frames, self._channel.received - len(frames) + 1):
            ended = self._on_frame(kind, payload)
            if kind != wire.STARTED or isinstance(self._request, Resume):
                self._channel.consume(number)  # ours is with what follows: none waits for it, and it would interrupt the guest at the start
            if ended is not None:
                try:
                    self._channel.flush()
                except ConnectionError:
                    pass
                return ended
        return None

    def _await(self, poll: select.poll) -> set[int]:
        """The descriptors that are ready; raises ConnectionResetError if the connection is known to be dead."""
        resets, timeout = self._resets, None
        if resets is not None:
            if resets.fd is None:
                timeout = SHORT * 1000
            else:
                poll.register(resets.fd, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(timeout)}
        if resets is not None and (not ready or resets.fd in ready):
            if resets.fd is None:
                resets.watch()
            if resets.happened():
                raise ConnectionResetError("a snapshot was taken")
        return ready

    def _read_stdin(self) -> None:
        assert self._stdin is not None
        try:
            data = os.read(self._stdin, wire.CHUNK)
        except BlockingIOError:
            return
        except OSError:  # a terminal that was hung up
            data = b""
        if data:
            self._channel.send(wire.STDIN, data)
        else:
            self._channel.send(wire.STDIN_EOF)
            self._stdin = None

    def _on_frame(self, kind: int, payload: bytes) -> Exit | None:
        if kind in (wire.STDOUT, wire.STDERR):
            self._before_printing()  # leaves the flag set; it stays so if on_output fails
            self._on_output("stdout" if kind == wire.STDOUT else "stderr", payload)
            self._printing = False
        elif kind == wire.STARTED:
            if self._on_started is not None:
                self._on_started(_count(_object(payload), "pid"))
        elif kind == wire.EXIT:
            ended = _object(payload)
            message = ended.get("message")
            return Exit(_count(ended, "code"), None if message is None else str(message))
        else:
            raise ChannelError(f"unexpected frame of type {kind}")
        return None

    def _say_farewell(self) -> None:
        """Tell the server that nobody waits for this process any more, if it can be told quickly."""
        if self._channel.socket is None:
            return
        try:
            self._channel.send(wire.HANGUP)
            end = time.monotonic() + FAREWELL_TIME
            while self._channel.wants_write and (left := end - time.monotonic()) > 0:
                poll = select.poll()
                poll.register(self._channel.socket, select.POLLOUT)
                poll.poll(left * 1000)
                self._channel.flush()
        except OSError:
            pass


def _object(payload: bytes) -> dict[str, object]:
    try:
        value = loads(payload)
    except (ValueError, RecursionError) as error:
        raise ChannelError(f"a frame is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ChannelError("a frame is not a JSON object")
    return value


def _count(message: dict[str, object], key: str) -> int:
    value = message.get(key, 0)
    if not isinstance(value, int) or value < 0:
        raise ChannelError(f"{key} is not a count")
    return value


def stream(
    connect: Connect,
    request: Request | Resume,
    *,
    stdin: int | None,
    on_output: Output | None = None,
    terminal: int | None = None,
    signals: Sequence[int] = (),
    on_started: Callable[[int], None] | None = None,
    give_up: Callable[[BaseException, float], bool] = give_up,
    resets: Resets | None = None,
    opened: socket | None = None,
    mask: set[int] | None = None,
) -> Exit:
    """Run a session to its end and return how the process ended.

    Arguments:
        connect: opens a stream socket to the server; called again whenever the connection breaks.
        stdin: a descriptor to read until its end, or None. Its bytes reach the process unchanged.
        on_output: called with ``"stdout"`` or ``"stderr"`` and bytes, in order; while it blocks, the process is slowed.
            By default it writes to our own stdout and stderr.
        terminal: the user's terminal, if the process has one: its size is followed, and if it is ``stdin`` too it is raw
            while the session runs, so that Ctrl-C is a key like others; else Ctrl-C is a signal to us.
        signals: signals to send on instead of suffering them (main thread only), for example ``FORWARDED``.
        on_started: called with the process's id once it runs.
        give_up: asked with the error and the seconds since the break after each failed attempt to reconnect.
        resets: tells of connections that break without our hearing of it.
        opened: a connection over which ``request`` was sent already (opening.py), without a ``terminal``.
        mask: of signals, to be set as soon as ``signals`` are sent on.

    Raises:
        AgentError: the server is gone, or does not speak the protocol.
        OSError: the first ``connect`` failed; BrokenPipeError and the like from ``on_output``: the process is hung up.
    """
    if terminal is not None:
        from fcvm.agent import terminal as tty

        if isinstance(request, Request):  # which then is not under way yet
            request.rows, request.columns = tty.size(terminal)
    on_output = on_output or to_descriptors(1, 2)
    client = Client(
        connect, request, stdin=stdin, on_output=on_output, on_started=on_started, give_up=give_up, resets=resets, opened=opened
    )
    if terminal is not None and isinstance(request, Resume):
        client.resize(*tty.size(terminal))

    def resize(*_: object) -> None:
        if terminal is not None:
            client.resize(*tty.size(terminal))

    resized = () if terminal is None else (signal.SIGWINCH,)
    with handled(resized, resize), handled(signals, lambda number, _: client.signal(number)):
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if terminal is None or terminal != stdin:
            return client.run()
        with tty.raw(terminal):
            return client.run()


def to_descriptors(stdout: int, stderr: int) -> Output:
    """An ``on_output`` that writes all of it, unbuffered, to two descriptors."""

    def write(name: str, data: bytes) -> None:
        descriptor = stdout if name == "stdout" else stderr
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(descriptor, view) :]
            except BlockingIOError:  # somebody else made it non-blocking
                select.select([], [descriptor], [])

    return write
