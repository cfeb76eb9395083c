"""One mount as the server sees it: its volume, its channels, and the requests that are under way."""

import contextlib
import errno
import logging
import signal
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from fuse_pipe import locking
from fuse_pipe import messages as m
from fuse_pipe.channel import ACK, CHANNELS, FAILED, KEPT_MESSAGES, NOTIFY, QUIET_AT, Buffers, Channel, server_channel
from fuse_pipe.errors import ConnectionLost, ProtocolError
from fuse_pipe.operations import ASKED_NEXT, CHANGES, OPERATIONS, SLOW
from fuse_pipe.volume import Volume
from fuse_pipe.worker import Worker, this_worker

log = logging.getLogger("fuse_pipe")

# Ends a thread's wait for a lock. It only has to interrupt a system call, so any signal with a handler does.
WAKE = signal.SIGUSR1
THREADS = 64  # for slow requests, at most; beyond it they wait for one another
SLOW_MOST = 1024  # slow requests and waits for locks at a time
REMEMBERED = 256  # interrupts of what is not done yet, or came before it
_OUT = m.OUT_HEADER.pack
_IN = m.IN_HEADER.unpack_from
_OUT_SIZE = m.OUT_HEADER.size


class Gate:
    """What requests are handled within; closed, it holds them off so that the session stands still.

    Several may close it at a time: it is open when all of them have opened it.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = self._closed = 0
        self._ended = False

    def __enter__(self) -> None:
        with self._condition:
            while self._closed:
                if self._ended:
                    raise ConnectionLost("the server ends")
                self._condition.wait()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._inside -= 1
            if self._closed:
                self._condition.notify_all()

    def close(self) -> None:
        """Let nobody in, and wait until nobody is inside."""
        with self._condition:
            self._closed += 1
            self._condition.wait_for(lambda: self._inside == 0)

    def open(self) -> None:
        """Let everybody in again."""
        with self._condition:
            self._closed -= 1
            self._condition.notify_all()

    def end(self) -> None:
        """Turn away for good whoever wants in, and wait until nobody is inside."""
        with self._condition:
            self._closed += 1
            self._ended = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._inside == 0)


class Waiting:
    """A request that waits for a lock in ``thread``."""

    __slots__ = ("interrupted", "lock", "thread")

    def __init__(self) -> None:
        self.thread: int | None = threading.get_ident()
        self.interrupted = False
        self.lock = threading.Lock()


class Session:
    """A mount, named by its relay; it outlives the connections."""

    def __init__(self, name: str, volume: Volume) -> None:
        self.name = name
        self.volume = volume
        self.channels: dict[int, Channel] = {}
        self.lock = threading.Lock()
        self.gate = Gate()
        self._news = threading.Lock()
        self.quiet = False  # whether the relay knows of QUIET, FAILED and ATTRIBUTES
        self.answers: dict[int, bytes] = {}  # unique -> answer, of requests that a killed server did
        self.ended = False
        self.slow: dict[int, tuple[int, bytes]] = {}  # unique -> channel and request, of what other threads do
        self.again: set[int] = set()  # those of a server before this one: the relay may send them as well
        self.answering: set[int] = set()  # those that are done
        self.waiting: dict[int, Waiting] = {}
        self.interrupted: OrderedDict[int, None] = OrderedDict()  # requests that are not done, or not begun
        self._threads = threading.BoundedSemaphore(THREADS)
        self.idle = threading.Condition(self.lock)  # notified when slow requests end, or begin to wait
        if volume.watcher is not None:
            volume.watcher.notify = self._notify
        self._unnotified = False  # notifications were dropped because nobody took them
        self._making_up: Iterator[None] = iter(())  # for that
        self._maker = threading.Lock()

    def channel(self, number: int) -> Channel:
        """The channel of this number, made when it is first asked for."""
        with self.lock:
            channel = self.channels.get(number)
            if channel is None:
                if len(self.channels) > CHANNELS or not NOTIFY <= number < CHANNELS:
                    raise ProtocolError(f"there is no channel {number}")
                channel = self.channels[number] = server_channel(number)
            return channel

    def _notify(self, message: bytes) -> bool:
        """Send a notification; False: it was dropped, for ``make_up``."""
        channel = self.channel(NOTIFY)
        if len(channel.unacked) < KEPT_MESSAGES // 2:
            channel.send(((message,),))
            return True
        self._unnotified = True
        return False

    def make_up(self, channel: Channel) -> None:
        """Have the kernel believe nothing any more if notifications were dropped: as far as they are taken now, at each
        acknowledgement a part.
        """
        watcher = self.volume.watcher
        if channel.number != NOTIFY or watcher is None or not self._maker.acquire(blocking=False):
            return
        try:
            while len(channel.unacked) < KEPT_MESSAGES // 4:
                if next(self._making_up, True):  # there was no more
                    if not self._unnotified:
                        return
                    self._unnotified = False
                    self._making_up = watcher.invalidate_all()
        except OSError:  # the mount has ended meanwhile
            pass
        finally:
            self._maker.release()

    def handle(self, channel: Channel, worker: Worker, message: memoryview, replies: list[Buffers]) -> None:
        """Do what one message asks; its reply, if there is one now, is added to ``replies``.

        Raises:
            ProtocolError: it is no message of the protocol.
        """
        length, opcode, unique, *_ = _IN(message)
        if opcode == ACK:
            channel.acknowledged(unique)
            return
        channel.count(length)
        if self.answers and unique in self.answers:  # done by a server before this one
            answer = self.answers.pop(unique)
            if answer and not message[QUIET_AT]:
                replies.append((answer,))
            return
        if opcode in SLOW:
            at_once = opcode == m.SETLKW and unique not in self.slow and self._lock_now(worker, message, unique, replies)
            if not at_once:
                self.defer(channel, unique, bytes(message))
            return
        if opcode == m.INTERRUPT:
            (wanted,) = self.volume.decoders[opcode](message[40:])
            self.interrupt(wanted)
            return
        reply = self.execute(worker, message)
        if opcode == m.SETLK and reply is not None:
            self._lock_answer(message, reply, replies)
            return
        if message[QUIET_AT]:
            self._quiet(channel, message, reply)
            return
        if self.quiet and opcode in ASKED_NEXT:
            reply = self._ahead(worker, opcode, message, reply)
        if reply is not None:
            replies.append(reply)

    def _quiet(self, channel: Channel, message: memoryview, reply: Buffers | None) -> None:
        """Say nothing of a QUIET request but that a write failed; at once, because another thread may do the FSYNC."""
        error = m.OUT_HEADER.unpack_from(reply[0])[1] if reply is not None else 0
        _, opcode, _, nodeid, *_ = _IN(message)
        if not error or opcode != m.WRITE:
            return
        self._notify(m.notification(m.NOTIFY_INVAL_INODE, nodeid, 0, 0))  # the kernel has cached what was not written
        failed = struct.pack("<i4xQ", -error, self.volume.next_handle)
        channel.send(((_OUT(_OUT_SIZE + len(failed), FAILED, nodeid) + failed,),))

    def _ahead(self, worker: Worker, opcode: int, message: memoryview, reply: Buffers | None) -> Buffers | None:
        """Put what the kernel asks for next before an answer."""
        if reply is None or m.OUT_HEADER.unpack_from(reply[0])[1]:
            return reply
        notify = self.channels.get(NOTIFY)
        if notify is None:
            return reply
        count = struct.pack("<Q", notify.base + len(notify.unacked))
        try:
            ahead = ASKED_NEXT[opcode](self.volume, worker, message, bytes(reply[0]))
        except OSError:
            return reply
        parts = [_OUT(_OUT_SIZE + len(count) + len(data), code, nodeid) + count + data for code, nodeid, data in ahead]
        return (b"".join((*parts, *reply)),)

    def execute(
        self, worker: Worker, message: memoryview, operation: Callable[..., Any] | None = None
    ) -> Buffers | None:
        """Do one request in this thread and note it; its reply as buffers, or None for what has no reply."""
        length, opcode, unique, nodeid, uid, gid, pid, extension, marks = _IN(message)
        decode = self.volume.decoders.get(opcode)
        if decode is None:
            return (_OUT(_OUT_SIZE, -errno.ENOSYS, unique),)
        try:
            if extension:
                if 40 + 8 * extension > length:
                    raise ProtocolError("extensions longer than their message")
                fields = decode(message[40 : length - 8 * extension])
                worker.groups = m.decode_groups(message[length - 8 * extension :])
            else:
                fields = decode(message[40:])
                worker.groups = ()
        except ProtocolError as error:
            if not m.REQUESTS[opcode].replies:
                raise
            log.debug("%s", error)  # the stream is still whole: only this request fails
            return (_OUT(_OUT_SIZE, -errno.EPROTO, unique),)
        worker.unique, worker.nodeid, worker.uid, worker.gid, worker.pid = unique, nodeid, uid, gid, pid
        worker.quiet = marks != 0
        if worker.acts:  # for the caller of an earlier request
            worker.be_root()
        try:
            payload = (operation or OPERATIONS[opcode])(self.volume, worker, *fields)
        except OSError as error:
            number = error.errno or errno.EIO
            return (_OUT(_OUT_SIZE, -number, unique),) if m.REQUESTS[opcode].replies else None
        except (OverflowError, ValueError):  # a number or name that no system call can take
            return (_OUT(_OUT_SIZE, -errno.EINVAL, unique),) if m.REQUESTS[opcode].replies else None
        except Exception:
            log.exception("%s failed", m.REQUESTS[opcode].name)
            return (_OUT(_OUT_SIZE, -errno.EIO, unique),) if m.REQUESTS[opcode].replies else None
        if opcode == m.DESTROY:
            self.ended = True
        reply: Buffers | None
        if payload is None:
            reply = None
        elif type(payload) is not bytes:
            reply = (_OUT(_OUT_SIZE + sum(map(len, payload)), 0, unique) + b"".join(payload),)
        elif (size := len(payload)) < 4096:
            reply = (_OUT(_OUT_SIZE + size, 0, unique) + payload,)
        else:
            reply = _OUT(_OUT_SIZE + size, 0, unique), payload
        journal = self.volume.journal
        if journal is not None:
            if opcode in CHANGES:
                journal.answer(unique, bytes(reply[0]) if reply is not None else b"")
            journal.flush()
        return reply

    # ---- requests that take long

    def _lock_now(self, worker: Worker, message: memoryview, unique: int, replies: list[Buffers]) -> bool:
        """Take a lock if that needs no waiting."""
        reply = self.execute(worker, message, locking.setlk_at_once)
        if reply is None:
            return False
        self._lock_answer(message, reply, replies)
        return True

    def _lock_answer(self, message: memoryview, reply: Buffers, replies: list[Buffers]) -> None:
        """Answer a request for a lock: who gets one must see what others wrote before they gave it up.

        So the kernel first drops what it has of the file if somebody else has changed it. That may wait for a page that
        is being read: the answer waits behind it, among the notifications, and not in the way of the answers to reads.
        """
        notify = self.channels.get(NOTIFY)
        if notify is None or m.OUT_HEADER.unpack_from(reply[0])[1] or not locking.takes(message):
            replies.append(reply)
            return
        nodeid = _IN(message)[3]
        with self._news:  # else the answer to another thread, for which it is no news any more, might overtake this one
            if locking.is_news(self.volume, nodeid):
                notify.send(((m.notification(m.NOTIFY_INVAL_INODE, nodeid, 0, 0),), reply))
            else:
                notify.send((reply,))

    def defer(self, channel: Channel, unique: int, message: bytes) -> None:
        """Do a request in another thread. It counts as taken in, so that the journal has it until it is answered."""
        with self.lock:
            if unique in self.slow:  # no kernel asks twice
                return
            crowded = len(self.slow) >= SLOW_MOST
            if not crowded:
                self.slow[unique] = (channel.number, message)
                self._note("slow", unique, channel.number, message)
        if not crowded:
            try:
                threading.Thread(
                    target=self._run_slow, args=(channel, unique, message), name="fuse_pipe slow", daemon=True
                ).start()
                return
            except RuntimeError:  # this host has no room for a thread
                with self.lock:
                    del self.slow[unique]
                    self._note("done", unique)
        channel.send(((_OUT(_OUT_SIZE, -errno.ENOLCK, unique),),))

    def _note(self, *record: Any) -> None:
        journal = self.volume.journal
        if journal is not None:
            journal.add(record)

    def _run_slow(self, channel: Channel, unique: int, message: bytes) -> None:
        waits = _IN(message)[1] == m.SETLKW
        try:
            if waits:
                reply = self._wait(unique, message)
            else:
                with self._threads:
                    reply = self.execute(this_worker(), memoryview(message))
        except ProtocolError as error:
            log.debug("%s", error)
            reply = (_OUT(_OUT_SIZE, -errno.EINVAL, unique),)
        except OSError as error:  # no memory for what belongs to a thread
            reply = (_OUT(_OUT_SIZE, -(error.errno or errno.EIO), unique),)
        with self.lock:
            self.answering.add(unique)
            wanted = unique in self.slow
            self.idle.notify_all()
        if wanted and reply is not None:
            replies: list[Buffers] = []
            if unique in self.again:
                self.answers[unique] = b"".join(reply)
            with contextlib.suppress(ProtocolError):  # nothing is acknowledged: whoever reads the connection ends it
                if waits:
                    self._lock_answer(memoryview(message), reply, replies)
                else:
                    replies.append(reply)
                channel.send(replies)
        with self.lock:  # only now: a state that is saved has the request or its answer
            if unique in self.slow:  # else it goes on in the next server
                self._note("done", unique)
                del self.slow[unique]
            self.again.discard(unique)
            self.answering.discard(unique)
            self.interrupted.pop(unique, None)

    def _wait(self, unique: int, message: bytes) -> Buffers | None:
        """Wait for a lock until it is there or the request is interrupted."""
        waiting = Waiting()
        with self.lock:
            self.waiting[unique] = waiting
            waiting.interrupted = unique in self.interrupted
            self.idle.notify_all()
        try:
            while not waiting.interrupted:
                reply = self.execute(this_worker(), memoryview(message))
                if reply is None or m.OUT_HEADER.unpack_from(reply[0])[1] != -errno.EINTR:
                    with self.lock:
                        self.interrupted.pop(unique, None)  # too late
                    return reply
            return (_OUT(_OUT_SIZE, -errno.EINTR, unique),)
        finally:
            with waiting.lock:
                waiting.thread = None
            with self.lock:
                self.waiting.pop(unique, None)

    def interrupt(self, unique: int) -> None:
        """The caller of a request got a signal: end its wait for a lock. Nothing else waits for long."""
        with self.lock:
            self.interrupted[unique] = None
            if len(self.interrupted) > REMEMBERED:
                self.interrupted.popitem(last=False)
            waiting = self.waiting.get(unique)
            if waiting is None or waiting.interrupted:
                return
            waiting.interrupted = True
        try:
            threading.Thread(target=_wake, args=(waiting,), name="fuse_pipe wake", daemon=True).start()
        except RuntimeError:  # this host has no room for a thread
            _wake(waiting)

    def drain(self) -> None:
        """Wait until no slow request is under way but those that wait for locks."""
        with self.idle:
            self.idle.wait_for(lambda: set(self.slow) <= set(self.waiting) | self.answering)

    def close(self) -> None:
        """Give up everything that the mount holds, between two requests."""
        self.gate.end()
        self.drain()
        with self.lock:
            self.slow.clear()
            waiting = list(self.waiting)
        for unique in waiting:
            self.interrupt(unique)
        if self.volume.journal is not None:
            self.volume.journal.close(remove=self.ended)
            self.volume.journal = None
        self.volume.close()


def _wake(waiting: Waiting) -> None:
    """Signal a waiting thread until it has noticed: a signal that comes just before the system call is lost."""
    pause = threading.Event()
    while True:
        with waiting.lock:
            if waiting.thread is None:
                return
            signal.pthread_kill(waiting.thread, WAKE)
        pause.wait(0.02)
