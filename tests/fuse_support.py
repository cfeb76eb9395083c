"""For the tests of fuse_pipe: real servers and mounts that always go away, a client without a kernel."""

import contextlib
import ctypes
import errno
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fuse_pipe import channel, linux
from fuse_pipe import messages as m
from fuse_pipe.server import Server

SOURCE = Path(__file__).parent.parent / "src"
CONTROL = Path("/sys/fs/fuse/connections")
PATIENCE = int(os.environ.get("FUSE_TEST_PATIENCE", "900"))  # seconds that a mount lives at most, for each test that uses it


def spawn(*arguments: str | os.PathLike[str], code: str | None = None) -> "subprocess.Popen[bytes]":
    """``python -m fuse_pipe ...``, or ``code``, killed with the test."""
    libc = ctypes.CDLL(None)
    return subprocess.Popen(
        [sys.executable, *(("-m", "fuse_pipe") if code is None else ("-c", code)), *map(os.fspath, arguments)],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: libc.prctl(1, signal.SIGKILL),
    )


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Ask again until it is true; for what no descriptor tells of."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.01)):
        value = condition()
        if value:
            return value
        pause.wait(0.01)
    raise AssertionError(f"waited {seconds} s for {what}")


def is_mounted(path: Path) -> bool:
    return any(line.split()[1] == str(path) for line in Path("/proc/self/mounts").read_text().splitlines())


def abort(device: int) -> None:
    """End a FUSE connection: whoever waits for it gets an error."""
    if not CONTROL.joinpath("..").exists():
        return
    if not any(CONTROL.iterdir()):
        with contextlib.suppress(OSError):
            linux.mount("fusectl", str(CONTROL), "fusectl", 0, "")
    with contextlib.suppress(OSError):
        (CONTROL / str(os.minor(device)) / "abort").write_text("1")


class Keeper:
    """Starts and stops servers from a process that has no file of a mount open.

    A child of the test would have, until it execs; closing them asks the server, which may just be what is not there.
    """

    def __init__(self) -> None:
        self.requests, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.requests.close()
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)
                self._serve(theirs)
            finally:
                os._exit(0)
        theirs.close()

    def _serve(self, sock: socket.socket) -> None:
        process: subprocess.Popen[bytes] | None = None
        while data := sock.recv(65536):
            what, arguments, code = pickle.loads(data)
            if what == "start":
                process = spawn(*arguments, code=code)
            elif process is not None and what == "stop":
                process.send_signal(code)
                process.wait()
            sock.send(pickle.dumps(process.poll() if process is not None else None))

    def ask(self, what: str, arguments: tuple[Any, ...] = (), code: Any = None) -> int | None:
        """``start`` with arguments and code, ``stop`` with a signal, or ``poll``; the process's exit code or None."""
        self.requests.send(pickle.dumps((what, arguments, code)))
        code = pickle.loads(self.requests.recv(65536))
        assert code is None or isinstance(code, int)
        return code

    def end(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            self.ask("stop", code=signal.SIGKILL)
        self.requests.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class Mount:
    """A directory served and mounted, each by a process of its own. ``path`` is the mount, ``host`` what it shows."""

    def __init__(
        self,
        base: Path,
        *,
        host: Path | None = None,
        serve: tuple[str, ...] = (),
        channels: int = 1,
        patience: float = PATIENCE,
    ) -> None:
        self.base = base
        self.patience = patience
        self.host = host or base / "host"
        self.path = base / "mount"
        self.socket = self.relay_socket = base / "socket"
        self.serve_options = serve
        self.channels = channels
        self.keeper = Keeper()
        self.relay: subprocess.Popen[bytes] | None = None
        self.device: int | None = None

    def start(self, program: str | None = None) -> None:
        """Serve and mount; ``program``: Python code that serves instead of the command."""
        if not self.host.exists():
            self.host.mkdir(parents=True)
        if self.host.is_file():
            self.path.touch()
        else:
            self.path.mkdir(exist_ok=True)
        self.start_server(program)
        self.relay = spawn("mount", self.relay_socket, self.path, "--channels", str(self.channels))
        wait_for(lambda: is_mounted(self.path) or self.relay.poll() is not None, "the mount")
        assert is_mounted(self.path), f"the relay ended with {self.relay.poll()}"
        self.device = self.mounted_device()
        self.watchdog = self._watched()

    def _watched(self) -> threading.Timer:
        """A request that is never answered cannot be interrupted: end it, so that the test fails rather than hangs."""
        watchdog = threading.Timer(self.patience, abort, (self.device,))
        watchdog.daemon = True
        watchdog.start()
        return watchdog

    def live_on(self) -> None:
        """For a test that shares the mount with others: it has all of its time again."""
        self.watchdog.cancel()
        self.watchdog = self._watched()

    def mounted_device(self) -> int:
        """The device number of the mount, without asking the server."""
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            words = line.split()
            if words[4] == str(self.path):
                major, minor = words[2].split(":")
                return os.makedev(int(major), int(minor))
        raise AssertionError("not mounted")

    def start_server(self, program: str | None = None) -> None:
        if program is None:
            self.keeper.ask("start", ("serve", self.host, "--socket", self.socket, *self.serve_options))
        else:
            self.keeper.ask("start", (self.host, self.socket), program)

        def listens() -> bool:
            assert self.keeper.ask("poll") is None, "the server ended"
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self.socket))
                return True
            return False

        wait_for(listens, "the server")

    def stop_server(self, number: int = signal.SIGTERM) -> None:
        self.keeper.ask("stop", code=number)

    def stop(self) -> None:
        """Unmount and end everything, whatever state it is in."""
        if self.device is not None:
            abort(self.device)
            self.watchdog.cancel()
        if self.relay is not None:
            self.relay.kill()
            self.relay.wait()
        self.keeper.end()
        while is_mounted(self.path):
            linux.umount(str(self.path), linux.MNT_DETACH)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory that other users can reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="fuse_pipe-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", path], check=False)


@contextlib.contextmanager
def mount(base: Path, **options: Any) -> Iterator[Mount]:
    """A ``Mount`` for as long as the context lasts."""
    mounted = Mount(base, **options)
    try:
        mounted.start()
        yield mounted
    finally:
        mounted.stop()


def error_of(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    """The name of the errno that a call fails with; "" if it does not fail."""
    try:
        function(*arguments, **keywords)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


class Client:
    """Speaks to a server as a relay does, without a kernel."""

    def __init__(
        self,
        server: Server,
        session: str = "test",
        number: int = 0,
        base: int = 0,
        received: int = 0,
        quiet: bool = False,
    ) -> None:
        self.sock, other = socket.socketpair()
        self.thread = threading.Thread(target=server.connection, args=(other,), daemon=True)
        self.thread.start()
        self.sock.settimeout(60)
        channel.send_hello(
            self.sock,
            {
                "fuse_pipe": 1, "session": session, "channel": number, "base": base, "received": received,
                "quiet": quiet,
            },
        )  # fmt: skip
        self.hello = channel.receive_hello(self.sock)
        self.sock.settimeout(60)
        self.reader = channel.Reader(self.sock, m.OUT_HEADER.size, m.MAX_REQUEST)
        self.unique = 2
        self.acks: list[int] = []
        self.ahead: list[tuple[int, int, bytes]] = []  # ATTRIBUTES, CONTENT and FAILED: code, node, what follows

    def send(self, opcode: int, nodeid: int = m.ROOT_ID, /, *tail: bytes, quiet: bool = False, **fields: Any) -> int:
        self.unique += 2
        request = bytearray(m.encode_request(opcode, self.unique, nodeid, *tail, **fields))
        request[channel.QUIET_AT] = quiet
        self.sock.sendall(request)
        return self.unique

    def receive(self) -> bytes:
        while True:
            while (message := self.reader.next()) is not None:
                _, error, unique = m.OUT_HEADER.unpack_from(message)
                if error == channel.ACK:
                    self.acks.append(unique)
                    continue
                if error in (channel.ATTRIBUTES, channel.CONTENT, channel.FAILED):
                    self.ahead.append((error, unique, bytes(message[m.OUT_HEADER.size :])))
                    continue
                return bytes(message)
            self.reader.more()

    def call(
        self, opcode: int, nodeid: int = m.ROOT_ID, /, *tail: bytes, **fields: Any
    ) -> tuple[tuple[Any, ...], bytes]:
        """One request; its structures and data, or the OSError that the server answers."""
        unique = self.send(opcode, nodeid, *tail, **fields)
        answered, error, structures, data = m.decode_reply(opcode, self.receive())
        assert answered == unique
        if error:
            raise OSError(error, os.strerror(error))
        return structures, data

    def init(self, flags: int = (1 << 43) - 1 & ~m.INIT_RESERVED) -> Any:
        return self.call(
            m.INIT, major=7, minor=45, max_readahead=1 << 20, flags=flags & 0xFFFFFFFF, flags2=flags >> 32
        )[0][0]

    def lookup(self, name: bytes, parent: int = m.ROOT_ID) -> Any:
        return self.call(m.LOOKUP, parent, name)[0][0]

    def create(
        self, name: bytes, parent: int = m.ROOT_ID, flags: int = os.O_RDWR, mode: int = 0o100644, **fields: int
    ) -> tuple[int, int]:
        """Node id and handle of a new file."""
        (entry, opened), _ = self.call(m.CREATE, parent, name, flags=flags, mode=mode, **fields)
        return entry.nodeid, opened.fh

    def close(self) -> None:
        self.sock.close()
        self.thread.join(60)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def client(root: Path, **options: Any) -> Iterator[Client]:
    """A client of a new server of ``root``, after INIT."""
    server = Server(str(root), **options)
    try:
        connected = Client(server)
        connected.init()
        yield connected
        connected.close()
    finally:
        server.close()
