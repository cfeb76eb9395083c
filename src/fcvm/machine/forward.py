"""Runs a parsed command in the machine as if it ran here: terminal, streams, signals, exit code, and its very life.

The command is a session of the machine's session server, reached through a Unix socket of the keeper's that leads to
the machine's virtio-vsock. Its grace is 0: if this process ends, even by SIGKILL, the connection breaks and the command is
killed. It is run as root for root, and as the account with the same number otherwise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from fcvm import hostpath
from fcvm.agent.session import FORWARDED, Exit, Request, stream, to_descriptors
from fcvm.config import Config
from fcvm.errors import AgentError, FcvmError, MachineError, SetupError
from fcvm.linux import sockets
from fcvm.machine import state
from fcvm.machine.state import Places
from fcvm.machine.sync import BASE, HOST, Plan, code_alone, plan, synced
from fcvm.network import address
from fcvm.setup.assets import Assets, find
from fcvm.storage.layout import Layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

STREAMS = ("stdin", "stdout", "stderr")

# Of our environment, what shapes a command's output.
PASSED_ON = ("TERM", "COLORTERM", "NO_COLOR", "LANG", "LC_ALL", "TZ")


def forward(envelope: Mapping[str, Any], config: Config, *, needs_assets: bool = True) -> int:
    """Run the command that ``envelope`` describes in the machine, started first if need be; returns its exit code.

    Arguments:
        needs_assets: it starts VMs. Others work in a running machine though a new fcvm has not been set up yet.

    Raises:
        SetupError: setup has not been run.
        HostError, MachineError: the machine cannot be started.
        BrokenPipeError: nobody reads our output any more; the command is hung up.
    """
    layout = Layout(config.base_dir)
    places = Places.of(layout.base)
    try:
        assets: Assets | None = find(config, layout)
    except SetupError:
        if needs_assets or state.read(places).phase != "running":
            raise
        assets = None
    wanted = plan(assets, layout.base) if assets else code_alone()
    if not _ready(places, wanted):
        _prepare(config, layout, assets, wanted)
    args = envelope["args"]
    # Its output is on a terminal where ours is; its stdin with -t only: else our terminal makes lines, and signals, of the keys.
    terminals = [fd for fd in (0, 1, 2) if os.isatty(fd) and (fd or args.get("tty"))]
    request = Request(
        [str(wanted.code), json.dumps(envelope)],
        target="fcvm",
        user=None if os.geteuid() == 0 else str(os.geteuid()),
        env=environment(wanted),
        cwd="/",
        tty=bool(terminals),
        pipes=[name for fd, name in enumerate(STREAMS) if fd not in terminals],
        stdin=bool(args.get("interactive")),  # else it is for whoever comes after us
        grace=0,
    )
    try:
        ended = run(places, request)
    except (OSError, AgentError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise _lost(places, error) from error
    if ended.message:
        raise FcvmError(ended.message, exit_code=ended.code)
    return ended.code


def run(places: Places, request: Request) -> Exit:
    """Run one session with our own streams and signals. Raises OSError, AgentError: the machine is not there."""
    terminals = [fd for fd, name in enumerate(STREAMS) if request.tty and name not in request.pipes]
    return stream(
        lambda: sockets.connect(places.session),
        request,
        stdin=0 if request.stdin else None,
        on_output=to_descriptors(1, 2),
        terminal=next(iter(terminals), None),
        signals=FORWARDED,
        give_up=lambda _error, _since: True,  # with a grace of 0 there is nothing to come back to
    )


def environment(wanted: Plan) -> dict[str, str]:
    """The environment of fcvm in the machine."""
    env = terminal_environment()
    env[hostpath.HOST_ROOT] = str(HOST)
    env["FCVM_BASE_DIR"] = str(BASE)
    env["FCVM_ASSETS"] = str(wanted.assets)
    env[hostpath.HOST_ADDRESS] = str(address.own() or "")
    if os.geteuid() != 0:
        env["XDG_RUNTIME_DIR"] = f"/run/user/{os.geteuid()}"
    return env


def terminal_environment() -> dict[str, str]:
    """What of our environment says how output should look."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ}


def _ready(places: Places, wanted: Plan) -> bool:
    return synced(places, wanted) and state.alive(places)


def _prepare(config: Config, layout: Layout, assets: Assets | None, wanted: Plan) -> None:
    from fcvm.machine.machine import Machine
    from fcvm.setup import progress

    machine = Machine(config, layout)
    with progress.open() as shown:
        if assets:
            machine.ensure_started(assets, shown)
        else:
            machine.renew(wanted, shown)


def has_terminal() -> bool:
    """Whether all our streams are one terminal that we may use."""
    return all(os.isatty(fd) for fd in (0, 1, 2)) and in_foreground()


def in_foreground() -> bool:
    """Whether stdin is ours to read: a job in the background must leave its terminal alone."""
    try:
        return not os.isatty(0) or os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def _lost(places: Places, error: Exception) -> MachineError:
    now = state.read(places)
    if now.phase == "broken" and now.error:
        return MachineError(now.error, hint=now.hint)
    if now.phase != "running":
        return MachineError("The machine was stopped while the command ran.", hint="fcvm machine start")
    return MachineError(f"The connection to the machine was lost: {error}", hint="fcvm machine status")


