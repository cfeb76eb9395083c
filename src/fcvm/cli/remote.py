"""Both ends of a command that runs in the machine.

``forward`` (on the user's host) sends the parsed, prepared arguments as one JSON envelope; ``main`` (in the machine,
as ``python -m fcvm.cli.remote ENVELOPE``) runs the command with them. Standard streams, terminal, signals and exit
code travel by the session protocol; see fcvm/machine/forward.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from fcvm.cli.context import Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Of the user's settings, those that shape a VM go along; those about places (base_dir, firecracker) are the machine's own.
FORWARDED_SETTINGS = ("log", "cpu", "mem", "scratch_size", "stop_timeout", "log_size", "kernel_profile")

# They start no VM, so they need nothing of setup's.
WITHOUT_ASSETS = ("exec", "logs", "ls", "rm", "stop")


def forward(args: argparse.Namespace, context: Context) -> int:
    """Run the command in the machine, started first if it is not running; returns the command's exit code."""
    from fcvm.machine.forward import forward as send

    settings = {name: str(getattr(context.config, name)) for name in FORWARDED_SETTINGS}
    envelope = {"args": vars(args), "settings": settings}
    return send(envelope, context.config, needs_assets=args.fcvm_command not in WITHOUT_ASSETS)


def main(argv: list[str] | None = None) -> int:
    """Run one forwarded command; ``argv`` holds the envelope."""
    from fcvm.cli.main import guarded

    envelope = json.loads((sys.argv[1:] if argv is None else argv)[0])
    os.environ.setdefault("FCVM_HOST_ROOT", "/host")
    return guarded(lambda: carry_out(envelope))


def carry_out(envelope: dict[str, Any]) -> int:
    """Run the command that the envelope holds."""
    from fcvm import config as settings
    from fcvm import log
    from fcvm.cli.main import COMMANDS, load

    context = Context(settings.load(envelope["settings"]))
    log.configure(context.config.log)
    args = argparse.Namespace(**envelope["args"])
    return int(load(COMMANDS[args.fcvm_command][0]).run(args, context))


if __name__ == "__main__":
    sys.exit(main())
