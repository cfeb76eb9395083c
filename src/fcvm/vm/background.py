"""Go on in the background: fork, tell the caller once how the start went, live on without a terminal."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable

from fcvm.errors import FcvmError
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
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _live(work, write, hint)
    os.close(write)
    with os.fdopen(read, "rb") as report:
        line = report.read()
    if not line:
        os.waitpid(child, 0)
        raise FcvmError(f"{what} died while it started.", hint=hint)
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        os.waitpid(child, 0)
        raise FcvmError(answer["error"], hint=answer["hint"], exit_code=answer["exit_code"])
    return child


def _live(work: Work, report: int, hint: str) -> NoReturn:
    code = 125
    told = False

    def tell(answer: dict[str, Any]) -> None:
        nonlocal told
        if not told:
            told = True
            with contextlib.suppress(OSError):
                os.write(report, json.dumps(answer).encode())
            os.close(report)

    try:
        os.setsid()
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
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
            tell({"error": f"{what}.", "hint": hint, "exit_code": code})
        except Exception:
            import traceback

            tell({"error": f"This is a bug in fcvm.\n{traceback.format_exc()}", "hint": None, "exit_code": code})
    finally:
        os._exit(code)
