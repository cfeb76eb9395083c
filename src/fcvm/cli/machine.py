"""``fcvm machine``: start, stop, look at, enter and remove the emulated host."""

import argparse
import json
import os
import sys
import time
from typing import Any

from fcvm.cli.context import Context
from fcvm.cli.values import number
from fcvm.errors import FcvmError, NotFoundError, UsageError

WHERE = "here"


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("start", help="start the machine, if it is not running, and copy into it what VMs need")
    actions.add_parser("stop", help="end its VMs and power it off")
    status = actions.add_parser("status", help="show what it is doing")
    status.add_argument("--json", action="store_true", help="as JSON")
    ssh = actions.add_parser("ssh", help="log in to it, or run a command in it")
    ssh.add_argument("words", nargs=argparse.REMAINDER, metavar="[--] COMMAND", help="run this instead of a shell")
    remove = actions.add_parser("rm", help="stop it and remove its disk with all its VMs, images and snapshots")
    remove.add_argument("-f", "--force", action="store_true", help="do not ask")
    logs = actions.add_parser("logs", help="print the end of its keeper's log and of its console")
    logs.add_argument("--previous", action="store_true", help="of the time before its last start: why it ended")
    logs.add_argument("-n", "--lines", default="50", metavar="N", help="lines of each (default 50)")


def run(args: argparse.Namespace, context: Context) -> int:
    return int(globals()[f"_{args.action}"](args, context))


def _start(args: argparse.Namespace, context: Context) -> int:
    from fcvm import setup
    from fcvm.machine.machine import Machine
    from fcvm.setup import progress

    machine = Machine(context.config, context.layout)
    assets = setup.find(context.config, context.layout)
    if machine.outdated(assets):
        print("The machine runs from other files or with other settings than it would be started with now.", file=sys.stderr)
        print("hint: fcvm machine stop; fcvm machine start", file=sys.stderr)
    with progress.open() as shown:
        machine.ensure_started(assets, shown)
    return 0


def _stop(args: argparse.Namespace, context: Context) -> int:
    from fcvm.machine.machine import Machine

    if not Machine(context.config, context.layout).stop():
        print("The machine is not running.", file=sys.stderr)
    return 0


def _status(args: argparse.Namespace, context: Context) -> int:
    values = _describe(context)
    if args.json:
        print(json.dumps(values, indent=2))
        return 0
    print(f"machine   {values['state']}" + (f" ({values['detail']})" if values["detail"] else ""))
    if values["error"]:
        print(f"error     {values['error']}")
    if values["state"] not in ("stopped", "broken"):
        print(f"uptime    {values['uptime_seconds']:.0f} s")
        print(f"cpus      {values['cpus']}")
        print(f"memory    {values['memory_used_mib']} of {values['memory_mib']} MiB")
        print(f"process   {values['pid']} (QEMU {values['qemu_pid']})")
    if values["disk_mib"]:
        print(f"disk      {values['disk_used_mib']} of {values['disk_mib']} MiB, {values['disk_path']}")
    return 0


def _describe(context: Context) -> dict[str, Any]:
    from fcvm.machine import state
    from fcvm.machine.state import Places

    places = Places.of(context.layout.base)
    now = state.read(places)
    try:
        disk = places.disk.stat()
        size, used = disk.st_size >> 20, disk.st_blocks * 512 >> 20
    except OSError:
        size = used = 0
    return {
        "schema": 1,
        "state": now.phase,
        "detail": now.detail,
        "error": now.error or None,
        "hint": now.hint or None,
        "pid": now.pid or None,
        "qemu_pid": now.qemu_pid or None,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now.since)) if now.pid else None,
        "uptime_seconds": round(state.uptime(now), 1),
        "cpus": now.cpus or context.config.machine_cpus,
        "memory_mib": now.memory or context.config.machine_mem,
        "memory_used_mib": _resident(now.qemu_pid) >> 20,
        "disk_mib": size,
        "disk_used_mib": used,
        "disk_path": str(places.disk),
    }


def _resident(pid: int) -> int:
    """Bytes of memory that a process uses now; 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _ssh(args: argparse.Namespace, context: Context) -> int:
    from fcvm.agent.session import Request
    from fcvm.machine import forward
    from fcvm.machine.machine import Machine

    machine = Machine(context.config, context.layout)
    if machine.status().phase != "running":
        _start(args, context)
    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if len(words) == 1:  # a line for the shell, as with ssh
        words = ["/bin/sh", "-c", *words]
    ended = forward.run(
        machine.places,
        Request(
            words or ["/bin/bash", "--login"],
            target="vm",
            env=forward.terminal_environment(),
            tty=forward.has_terminal(),
            stdin=forward.in_foreground(),
            grace=0,
        ),
    )
    if ended.message:
        raise FcvmError(ended.message, exit_code=ended.code)
    return ended.code


def _rm(args: argparse.Namespace, context: Context) -> int:
    from fcvm.machine.machine import Machine

    machine = Machine(context.config, context.layout)
    if not args.force and machine.places.disk.exists():
        if not os.isatty(0):
            raise UsageError("The machine's disk is not removed without asking, and nobody can be asked.", hint="fcvm machine rm --force")
        print(f"This removes {machine.places.disk} with all VMs and snapshots in it. Go on? [y/N] ", end="", file=sys.stderr)
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            return 1
    machine.remove()
    return 0


def _logs(args: argparse.Namespace, context: Context) -> int:
    from fcvm.machine.state import Places, previous

    places = Places.of(context.layout.base)
    lines = number(args.lines, "--lines", least=1)
    paths = [places.log, places.console]
    found = [path for path in (map(previous, paths) if args.previous else paths) if path.exists()]
    if not found:
        if args.previous and places.log.exists():
            raise NotFoundError("The machine has been started only once.", hint="fcvm machine logs")
        raise NotFoundError("The machine was never started.", hint="fcvm machine start")
    for path in found:
        print(f"==> {path} <==")
        print("\n".join(path.read_text(errors="replace").splitlines()[-lines:]))
    return 0
