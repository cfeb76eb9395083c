"""The guest's side: mounts /dev/fuse and carries the kernel's messages to a server, without looking into them.

Every channel is one open of /dev/fuse (``FUSE_DEV_IOC_CLONE``), one stream socket and two threads: one up, one down. A
connection that breaks is made again and what the server does not have is sent again (see ``channel``); the kernel and
its programs only see a pause.

Some requests are answered here; see ``shortcuts``.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

from fuse_pipe import linux
from fuse_pipe import messages as m
from fuse_pipe.channel import (
    ACK,
    ATTRIBUTES,
    CHANNELS,
    CONTENT,
    FAILED,
    NOTIFY,
    PROTOCOL,
    QUIET_AT,
    Buffers,
    Channel,
    Reader,
    receive_hello,
    relay_channel,
    send_hello,
    tune,
)
from fuse_pipe.errors import ConnectionLost, FusePipeError
from fuse_pipe.shortcuts import NOTED, Shortcuts

log = logging.getLogger("fuse_pipe")

Connect = Callable[[], socket.socket]

COPIED = 64 * 1024  # requests up to this size are copied out of the read buffer; larger ones take it with them
SPARE_BUFFERS = 4
READ_AHEAD = 512  # KiB that the kernel reads ahead of a program; by itself it takes 128, and reads of whole files a third longer
RETRY_FIRST, RETRY_MOST = 0.01, 1.0  # seconds between attempts to connect again
_GONE = (errno.ENODEV, errno.ECONNABORTED, errno.EBADF, errno.ENOTCONN)
_HEAD = struct.Struct("<IIQQ")
_FAILED, _NODE = struct.Struct("<i4xQ"), struct.Struct("<Q")  # of FAILED; of every notification that is sent
_UNANSWERED = frozenset(opcode for opcode, request in m.REQUESTS.items() if not request.replies)
# What a server must get though nobody waits for an answer: else it writes nothing, or keeps files and locks for ever.
_QUIET_DUE = frozenset((m.WRITE, m.RELEASE, m.RELEASEDIR))
_FORGETS = frozenset((m.FORGET, m.BATCH_FORGET))


class Relay:
    """One mount. ``mount`` makes it, ``run`` carries messages until it is unmounted."""

    def __init__(self, connect: Connect, mountpoint: str, *, channels: int = 1, source: str = "fuse_pipe") -> None:
        """
        Arguments:
            connect: makes a new connection to the server; raises OSError while there is none.
            channels: how many requests can be read from the kernel at a time, ``CHANNELS`` at most.
            source: what the mount table shows as the device.
        """
        if not 1 <= channels <= CHANNELS:
            raise ValueError(f"a mount has 1 to {CHANNELS} channels, not {channels}")
        self.connect = connect
        self.mountpoint = os.path.abspath(mountpoint)
        self.session = os.urandom(16).hex()
        self.source = source
        self.channels = [relay_channel(n) for n in range(channels)]
        self.notifications = relay_channel(NOTIFY)
        self.shortcuts = Shortcuts(self.notifications, behind=channels == 1)
        self.pending: dict[int, int] = {}  # requests without an answer: unique -> the descriptor that wants it
        self.fds: list[int] = []
        self.stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._spare: list[bytearray] = []

    # ---- mounting

    def mount(self) -> None:
        """Connect and mount.

        Raises:
            OSError: there is no server, or this process may not mount.
            FusePipeError: what answers is not a server.
        """
        first, hello = self._hello(self.channels[0])
        try:
            root = "100000" if hello.get("kind") == "file" else "40000"
            fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
            self.fds.append(fd)
            options = (
                f"fd={fd},rootmode={root},user_id={os.getuid()},group_id={os.getgid()},allow_other,default_permissions"
            )
            linux.mount(
                self.source,
                self.mountpoint,
                "fuse.fuse_pipe",
                linux.MS_RDONLY if hello.get("read_only") else 0,
                options,
            )
            self._read_ahead()
            for _ in self.channels[1:]:
                clone = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
                self.fds.append(clone)
                fcntl.ioctl(clone, m.DEV_IOC_CLONE, struct.pack("<I", fd))
        except BaseException:
            first.close()
            self.close()
            raise
        for number, channel in enumerate(self.channels):
            channel.dropped = self._recycle
            self._start(self._up, channel, self.fds[number])
            self._start(self._down, channel, self.fds[number], first if number == 0 else None, hello)
        self._start(self._down, self.notifications, self.fds[0], None, hello)

    def _read_ahead(self) -> None:
        """Have the kernel read further ahead, where we may say so (sysfs-class-bdi); no request is made for it."""
        with contextlib.suppress(OSError):
            fd = os.open(self.mountpoint, os.O_PATH | os.O_CLOEXEC)
            try:
                device = linux.device(fd)
            finally:
                os.close(fd)
            with open(f"/sys/class/bdi/{device}/read_ahead_kb", "w") as setting:
                setting.write(str(READ_AHEAD))

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, name=f"fuse_pipe {target.__name__}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def run(self) -> None:
        """Wait until the mount is gone."""
        for thread in self._threads:
            thread.join()
        self.close()

    def unmount(self) -> None:
        """Take the mount away, from under its users if there are any."""
        with contextlib.suppress(OSError):
            linux.umount(self.mountpoint, linux.MNT_DETACH)

    def close(self) -> None:
        """Give back every descriptor; the kernel then ends what still waits with ENOTCONN."""
        self.stop.set()
        for channel in (*self.channels, self.notifications):
            self._hang_up(channel)
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()

    # ---- connections

    def _hello(self, channel: Channel) -> tuple[socket.socket, dict[str, Any]]:
        sock = self.connect()
        try:
            tune(sock)
            send_hello(
                sock,
                {
                    "fuse_pipe": PROTOCOL, "session": self.session, "channel": channel.number, "base": channel.base,
                    "received": channel.received, "quiet": True,
                },
            )  # fmt: skip
            hello = receive_hello(sock)
            if "error" in hello:
                raise FusePipeError(str(hello["error"]))
            if not isinstance(hello.get("received"), int | None):
                raise FusePipeError("a hello without its fields")
            self.shortcuts.quiet = hello.get("quiet") is True
        except BaseException:
            sock.close()
            raise
        return sock, hello

    def _connect(self, channel: Channel) -> tuple[socket.socket, dict[str, Any]] | None:
        """A new connection, however long it takes; None when the mount is gone."""
        pause = RETRY_FIRST
        told = False
        while not self.stop.is_set():
            try:
                return self._hello(channel)
            except (OSError, FusePipeError) as error:
                if pause >= RETRY_MOST and not told:
                    told = True
                    log.warning("no connection to the server of %s: %s", self.mountpoint, error)
            self.stop.wait(pause)
            pause = min(2 * pause, RETRY_MOST)
        return None

    def _hang_up(self, channel: Channel) -> None:
        sock = channel.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    # ---- carrying

    def _up(self, channel: Channel, fd: int) -> None:
        """Kernel to server."""
        buffer = bytearray(m.MAX_REQUEST)
        view = memoryview(buffer)
        head = _HEAD.unpack_from
        lock, pending, noted, shortcut = channel.lock, self.pending, NOTED, self.shortcuts.request
        while True:
            try:
                size = os.readv(fd, (buffer,))
            except OSError as error:
                if error.errno in _GONE:
                    break
                continue  # ENOENT, EINTR: the request was taken back
            _, opcode, unique, nodeid = head(buffer)
            if opcode in noted and (answer := shortcut(channel, opcode, unique, nodeid, buffer, size)) is not None:
                with contextlib.suppress(OSError):
                    os.write(fd, answer)
                if not buffer[QUIET_AT]:
                    continue
            elif opcode not in _UNANSWERED:
                pending[unique] = fd
            message: bytes | memoryview
            if size <= COPIED:
                message = bytes(view[:size])
            else:
                message = view[:size]
                buffer = self._spare.pop() if self._spare else bytearray(m.MAX_REQUEST)
                view = memoryview(buffer)
            with lock:
                channel.unacked.append((message,))
                channel.kept += size
                sock = channel.sock
                if sock is None:
                    continue
                ack = channel.due()
                try:
                    if ack is not None:
                        sock.sendall(ack)
                    sock.sendall(message)
                except OSError:
                    channel.sock = None
        self.stop.set()
        for other in (*self.channels, self.notifications):
            self._hang_up(other)

    def _recycle(self, message: Buffers) -> None:
        """Use the buffer of a large request again."""
        if isinstance(message[0], memoryview) and len(self._spare) < SPARE_BUFFERS:
            buffer = message[0].obj
            if isinstance(buffer, bytearray):
                self._spare.append(buffer)

    def _down(self, channel: Channel, fd: int, sock: socket.socket | None, hello: dict[str, Any]) -> None:
        """Server to kernel, and the one that connects again."""
        pause, received = RETRY_FIRST, channel.received
        while True:
            if sock is None:
                # A server that hangs up on what it is sent, every time, is not asked again without a pause.
                pause = RETRY_FIRST if channel.received != received else min(2 * pause, RETRY_MOST)
                received = channel.received
                if pause > RETRY_FIRST and self.stop.wait(pause / 2):
                    return
                connected = self._connect(channel)
                if connected is None:
                    return
                sock, hello = connected
            # Sending again is another thread's work: the server may not read on before its own replies are taken.
            threading.Thread(target=self._attach, args=(channel, sock, hello["received"]), daemon=True).start()
            try:
                self._receive(channel, fd, sock)
            except ConnectionLost:
                pass
            except FusePipeError as error:
                log.warning("connection closed: %s", error)
            channel.detach(sock)
            sock.close()
            sock = None
            if self.stop.is_set():
                return

    def _attach(self, channel: Channel, sock: socket.socket, received: int | None) -> None:
        try:
            if received is None:  # a server without memory of this channel gets what has no answer
                received = self._forget_answered(channel)
            channel.attach(sock, received)
        except FusePipeError as error:
            log.warning("connection closed: %s", error)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        if self.stop.is_set():
            self._hang_up(channel)

    def _forget_answered(self, channel: Channel) -> int:
        with channel.lock:
            kept = [message for message in channel.unacked if self._is_unanswered(message[0])]
            channel.unacked.clear()
            channel.unacked.extend(kept)
            channel.kept = sum(len(message[0]) for message in kept)
            return channel.base

    def _is_unanswered(self, message: bytes | bytearray | memoryview) -> bool:
        _, opcode, unique, _ = _HEAD.unpack_from(message)
        if opcode == m.INTERRUPT:  # has no answer itself, and the kernel says so once
            (unique,) = m.INTERRUPT_IN.unpack_from(message, m.IN_HEADER.size)
        return unique in self.pending or opcode in _FORGETS or (opcode in _QUIET_DUE and message[QUIET_AT] != 0)

    def _receive(self, channel: Channel, fd: int, sock: socket.socket) -> None:
        reader = Reader(sock, m.OUT_HEADER.size, m.MAX_REQUEST)
        header, write, following = m.OUT_HEADER.unpack_from, os.write, reader.next
        notifications, pending, shortcuts = channel.number == NOTIFY, self.pending, self.shortcuts
        asked = shortcuts.asked
        ahead: list[bytes] = []
        while True:
            reader.more()
            while (message := following()) is not None:
                length, error, unique = header(message)
                if error == ACK:
                    channel.acknowledged(unique)
                    continue
                if error in (ATTRIBUTES, CONTENT):
                    ahead.append(bytes(message))
                    continue
                channel.count(length)
                if error == FAILED:
                    shortcuts.failed(unique, *_FAILED.unpack_from(message, m.OUT_HEADER.size))
                    continue
                wanted_by = pending.pop(unique, fd)
                answer: bytes | memoryview = message
                if unique in asked:
                    answer = shortcuts.reply(unique, error, message, ahead)
                elif not unique:
                    shortcuts.notified(*_NODE.unpack_from(message, m.OUT_HEADER.size))
                if ahead:
                    ahead.clear()
                try:
                    write(wanted_by, answer)
                except OSError as failed:
                    if failed.errno in _GONE:
                        return
                    # ENOENT: the caller is gone, or the kernel forgot the inode that a notification is about.
            if notifications and channel.overdue():
                channel.send(())


@contextlib.contextmanager
def mounted(connect: Connect, mountpoint: str, **options: Any) -> Iterator[Relay]:
    """A mount for as long as the context lasts."""
    relay = Relay(connect, mountpoint, **options)
    relay.mount()
    try:
        yield relay
    finally:
        relay.unmount()
        relay.close()


def mount_and_relay(
    connect: Connect, mountpoint: str, *, channels: int = 1, ready: Callable[[], None] | None = None
) -> None:
    """Mount what the server behind ``connect`` serves and relay until it is unmounted; ``ready`` is called once
    mounted.
    """
    relay = Relay(connect, mountpoint, channels=channels)
    relay.mount()
    if ready is not None:
        ready()
    relay.run()
