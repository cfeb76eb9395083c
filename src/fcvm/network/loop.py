"""A thread that waits on file descriptors and deadlines and calls back: what relays run on.

One loop serves all the sockets of a network. Everything that handles sockets runs in the loop's thread; other threads hand
it work with ``call``.
"""

import heapq
import itertools
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from socket import socket

from fcvm import log

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE
Handler = Callable[[int], None]

BATCH = 64  # what a handler takes of what has come, before it gives way to the other sockets


class Loop:
    """The thread starts with ``start`` and ends with ``close``, which also closes every socket that it was given."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, READ, None)
        self._sockets: set[socket] = set()
        self._calls: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread; it is in the network namespace that the caller is in now."""
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, wait for it, and close the sockets; a second call does nothing."""
        if self._closing:
            return
        self._closing = True
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)
            self._thread.join()
        for sock in self._sockets:
            sock.close()
        self._selector.close()
        os.close(self._wake)

    def call(self, function: Callable[[], None]) -> None:
        """Have ``function`` called in the loop's thread, soon; from any thread."""
        self._calls.append(function)
        os.eventfd_write(self._wake, 1)

    def after(self, seconds: float, function: Callable[[], None]) -> None:
        """Have ``function`` called in so many seconds; from the loop's thread."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._count), function))

    def own(self, sock: socket) -> socket:
        """Close ``sock`` when the loop is closed, unless it was dropped before; returns it."""
        self._sockets.add(sock)
        return sock

    def watch(self, sock: socket, events: int, handler: Handler) -> None:
        """Call ``handler(ready)`` whenever ``sock`` is ready; again for a socket changes its events (0: none)."""
        self._sockets.add(sock)
        known = sock.fileno() in self._selector.get_map()
        if known and not events:
            self._selector.unregister(sock)
        elif known:
            self._selector.modify(sock, events, handler)
        elif events:
            self._selector.register(sock, events, handler)

    def drop(self, sock: socket) -> None:
        """Stop watching ``sock`` and close it."""
        with suppress(KeyError, ValueError):
            self._selector.unregister(sock)
        self._sockets.discard(sock)
        sock.close()

    def _run(self) -> None:
        while not self._closing:
            timeout = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
            for key, ready in self._selector.select(timeout):
                if key.data is None:
                    os.eventfd_read(self._wake)
                # a handler before this one may have closed the socket, whose number may even be another's by now
                elif isinstance(key.fileobj, socket) and key.fileobj.fileno() == key.fd:
                    self._guard(lambda key=key, ready=ready: key.data(ready))  # type: ignore[misc]
            while self._calls:
                self._guard(self._calls.popleft())
            while self._timers and self._timers[0][0] <= time.monotonic():
                self._guard(heapq.heappop(self._timers)[2])

    def _guard(self, function: Callable[[], None]) -> None:
        """One connection's bad luck must not end the others."""
        try:
            function()
        except OSError as error:
            log.debug(f"relay: {error}")
        except Exception:
            import traceback

            log.error(f"relay: {traceback.format_exc()}")
