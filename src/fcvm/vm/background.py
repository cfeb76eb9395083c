"""Go on in the background: fork, tell the caller once how the start went, live on without a terminal.

Until then it is the caller's: signals that would end that are passed on, and when it is killed the background is told to end.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
from collections.abc import Callable, Iterator

from fcvm.errors import FcvmError, of_system
from fcvm.linux import leash
from fcvm.signals import STOPPING, handled
from fcvm.vm import rpc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

Work = Callable[[Callable[[], None]], int]


def detached(what: str, work: Work, *, hint: str) -> int:
    """Run ``work(ready)`` in a background process, whose exit code it returns; gives its pid once ``ready`` was called.

    Work that ends by itself before it was ready has done all there was to do, which is as good. No thread may run in
    this process yet.

    Arguments:
        what: names the process in the error for its death.
        hint: goes with errors that have none of their own.

    Raises:
        FcvmError: what ``work`` raised before it was ready; or the process died.
        SystemExit: a signal came before it was ready; it has ended by that as well.
    """
    read, write = os.pipe()
    ours, theirs = os.pipe()  # nobody reads here: on Linux 6.12 that would raise the signal for the end of whoever reads
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # until whoever gets one knows what to do
    child = os.fork()
    if child == 0:
        os.close(read)
        os.close(ours)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        _live(work, write, theirs, hint)
    os.close(write)
    os.close(theirs)
    with os.fdopen(ours, "rb"), os.fdopen(read, "rb") as report, _passing_on(child) as signals:
        line = report.read()
        if signals:
            os.waitpid(child, 0)
    if signals:
        raise SystemExit(128 + signals[0])
    if not line:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        raise FcvmError(f"{what} died while it started, {how}.", hint=hint)
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        os.waitpid(child, 0)
        raise FcvmError(answer["error"], hint=answer["hint"], exit_code=answer["exit_code"])
    return child


@contextlib.contextmanager
def _passing_on(child: int) -> Iterator[list[int]]:
    """Inside the block ``child`` gets the signals that would end us; yields a list of those that have come."""
    signals: list[int] = []
    pidfd = os.pidfd_open(child)

    def handle(number: int, frame: object) -> None:
        signals.append(number)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)

    try:
        with handled(STOPPING, handle):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
            yield signals
    finally:
        os.close(pidfd)


def _live(work: Work, report: int, caller: int, hint: str) -> NoReturn:
    """Be the background process: ``report`` is the pipe for what there is to tell, ``caller`` one that breaks with our caller."""
    code = 125
    told = False

    def tell(answer: dict[str, Any]) -> None:
        nonlocal told
        if not told:
            told = True
            leash.forget(caller)
            os.close(caller)
            with contextlib.suppress(OSError):
                os.write(report, json.dumps(answer).encode())
            os.close(report)

    try:
        os.setsid()
        leash.watch(caller, os.getpid(), signal.SIGTERM)
        if _is_broken(caller):  # our caller was killed before
            os._exit(code)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        try:
            code = work(lambda: tell({"ready": True}))
            tell({"ready": True})
        except FcvmError as error:
            tell(rpc.failure(error))
            code = error.exit_code
        except OSError as error:  # a full disk, say
            tell(rpc.failure(of_system(error, hint=hint)))
        except Exception:
            import traceback

            tell({"error": f"This is a bug in fcvm.\n{traceback.format_exc()}", "hint": None, "exit_code": code})
    finally:
        os._exit(code)


def _is_broken(pipe: int) -> bool:
    """Whether nobody can read from it any more."""
    poll = select.poll()
    poll.register(pipe, 0)
    return bool(poll.poll(0))
