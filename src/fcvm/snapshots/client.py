"""The client of a clone server: `fcvm snapshot run --pid`.

The clone lives as long as our connection; the container writes to our own stdout and stderr, whose descriptors the
server is given, so nothing is copied through this process. It counts milliseconds: nothing heavy is imported.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from fc_agent.structs import Struct
from fcvm.errors import ConflictError, ContainerError, FcvmError, UsageError
from fcvm.signals import PASSED_ON, STOPPING, handled
from fcvm.snapshots import servers
from fcvm.storage.layout import Layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FEW = 100  # clones for which any limit of descriptors will do


class Wanted(Struct):
    """A clone that is asked for; ``name`` None: made up, ``network`` None: that of the server."""

    name: str | None
    publish: list[str]
    network: str | None = None
    log_prefix: bool | None = None


class Clone:
    """A clone that was asked for over a connection of its own."""

    def __init__(
        self, layout: Layout, pid: int, wanted: Wanted, *, detach: bool = False, fds: Sequence[int] = ()
    ) -> None:
        """Ask for it; raises NotFoundError if there is no server ``pid``."""
        self.pid = pid
        request = {
            "op": "run",
            "name": wanted.name,
            "publish": wanted.publish,
            "network": wanted.network,
            "log_prefix": wanted.log_prefix,
            "detach": detach,
        }
        self.connection = servers.connect(layout, pid, request, fds)
        self.messages = servers.lines(self.connection)

    def started(self) -> dict[str, str]:
        """Wait until it runs: its ``id`` and ``name``; raises what has prevented it."""
        answer = self._next()
        if "started" not in answer:
            raise ConflictError("The clone ended before its container ran on.", hint="fcvm snapshot ls")
        names: dict[str, str] = answer["started"]
        return names

    def exit(self) -> int:
        """Wait for its end: the container's exit code; raises FcvmError if it ended in another way."""
        return int(self._next()["exit"])

    def _next(self) -> dict[str, Any]:
        answer = next(self.messages, None)
        if answer is None:
            raise ConflictError(
                f"The clone server {self.pid} has ended, and its clones with it.", hint="fcvm snapshot ls"
            )
        return servers.checked(answer)

    def ask(self, op: str, **more: int) -> None:
        """``stop`` or ``kill`` it; send it a ``signal``; or ``detach`` it, which lets it live on after ``close``."""
        servers.send(self.connection, {"op": op, **more})

    def end(self) -> None:
        """Kill it, and see it gone: its name and its ports are free."""
        self.ask("kill")
        with contextlib.suppress(FcvmError):
            while "exit" not in self._next():
                pass

    def close(self) -> None:
        """Give it up: it is killed, unless it is detached."""
        self.connection.close()


def run(layout: Layout, pid: int, wanted: Sequence[Wanted], *, attached: bool, detach: bool = False) -> int:
    """Run clones until they end; returns the exit code of the first that is not 0.

    Prints their names once they run, or with ``attached`` their containers' output instead. The first SIGINT, SIGTERM or
    SIGHUP stops them, the second kills them; PASSED_ON reach their containers.

    Raises:
        NotFoundError: there is no such server. FcvmError: a clone cannot be made; then none of them is left.
    """
    if len(wanted) > FEW:
        _allow_connections(len(wanted))
    with contextlib.ExitStack() as stack:
        clones: list[Clone] = []
        asked = stack.enter_context(_stopping(clones))
        try:
            for want in wanted:  # all are asked for before the first is waited for
                clone = Clone(layout, pid, want, detach=detach, fds=(1, 2) if attached else ())
                stack.callback(clone.close)
                clones.append(clone)
                if asked:  # by a signal that has not met it, or not for sure
                    clone.ask(asked[-1])
            started = [clone.started() for clone in clones]
        except FcvmError:
            for clone in clones:  # all are told before the first is waited for
                clone.ask("kill")
            for clone in clones:
                clone.end()
            raise
        for clone in clones if detach else ():
            clone.ask("detach")
        if not attached:
            for names in started:
                print(names["name"], flush=True)
        if detach:
            return 0
        codes = [clone.exit() for clone in clones]
    return next((code for code in codes if code), 0)


def _allow_connections(count: int) -> None:
    """Each clone has a connection; raises UsageError if we may not have so many."""
    from fcvm.linux import descriptors

    most = descriptors.allow_all() - FEW
    if count > most:
        raise UsageError(
            f"A fleet of {count} clones needs as many open files, and the hard limit here is {most + FEW}.",
            hint=f"--count {most}, or a higher limit: ulimit -n, LimitNOFILE= of systemd",
        )


def execute(layout: Layout, pid: int, wanted: Wanted, command: Sequence[str]) -> int:
    """Run ``command`` in the container of a new clone, then end that; returns the command's exit code."""
    with contextlib.closing(Clone(layout, pid, wanted)) as clone:
        from fcvm.agent import session  # while the clone starts
        from fcvm.vm import sessions

        directory = os.path.join(layout.root, "vms", clone.started()["id"])
        try:
            end = sessions.stream(
                directory,
                session.Request(command),
                stdin=None,
                on_output=session.to_descriptors(1, 2),
                signals=session.FORWARDED,
            )
        except (FileNotFoundError, ConnectionRefusedError):
            clone.exit()  # says so if it failed
            raise ConflictError(
                "The clone has ended.", hint=f"fcvm snapshot run --pid {pid} shows its output"
            ) from None
        if wanted.name is not None or wanted.publish:  # the next one may have the same name, or port
            clone.end()
    if end.message:
        raise ContainerError(end.message, exit_code=end.code)
    return end.code


@contextlib.contextmanager
def _stopping(clones: list[Clone]) -> Iterator[list[str]]:
    """Turn the first signal into a stop of all clones, the next into a kill; yields a list of what was asked of them.

    Signals that end nothing are passed on to those that there are.
    """
    asked: list[str] = []

    def handle(number: int, frame: object) -> None:
        if number in PASSED_ON:
            for clone in clones:
                clone.ask("signal", signal=int(number))
            return
        asked.append("kill" if asked else "stop")
        for clone in clones:
            clone.ask(asked[-1])

    with handled((*STOPPING, *PASSED_ON), handle):
        yield asked
