"""Go on in the background: fork, tell the caller once how the start went, live on without a terminal."""

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any, NoReturn

from fcvm.errors import FcvmError
from fcvm.vm import rpc


def detached(work: Callable[[Callable[[], None]], None]) -> int:
    """Run ``work(ready)`` in a background process; returns its pid as soon as it has called ``ready``.

    No thread may run in this process yet.

    Raises:
        FcvmError: what ``work`` raised before it was ready.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _live(work, write)
    os.close(write)
    with os.fdopen(read, "rb") as report:
        line = report.read()
    if not line:
        os.waitpid(child, 0)
        raise FcvmError("The clone server died while it started.", hint="FCVM_LOG=debug fcvm snapshot serve TAG")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        os.waitpid(child, 0)
        raise FcvmError(answer["error"], hint=answer["hint"], exit_code=answer["exit_code"])
    return child


def _live(work: Callable[[Callable[[], None]], None], report: int) -> NoReturn:
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
            work(lambda: tell({"ready": True}))
            code = 0
        except FcvmError as error:
            tell(rpc.failure(error))
            code = error.exit_code
    finally:
        os._exit(code)
