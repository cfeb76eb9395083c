"""`fcvm exec`: a command in a VM's container, or with --vm in its guest OS.

Scripts run it often, so it costs little beside the command itself: `python -m bench.exec`. Of what an interpreter and its
imports take, argparse and what that needs would be a third.
"""

from __future__ import annotations

import os
import sys

from fcvm.agent.opening import Request
from fcvm.cli import target
from fcvm.cli.context import Arguments, Context
from fcvm.errors import ContainerError, FcvmError, UsageError
from fcvm.signals import FORWARDED
from fcvm.vm import sessions, state

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

WHERE = "vms"
SHELLS = ("sh", "bash", "ash", "dash", "zsh", "fish")
FLAGS = {
    "--vm": ["vm"], "--privileged": ["privileged"], "--interactive": ["interactive"], "--tty": ["tty"],
    "-i": ["interactive"], "-t": ["tty"], "-it": ["interactive", "tty"], "-ti": ["interactive", "tty"],
}  # fmt: skip


def plain(argv: list[str]) -> Arguments | None:
    """The arguments of `exec [FLAG ...] NAME [--] COMMAND ...` as ``configure``'s parser finds them; None for what is written otherwise."""
    words, flags = argv[1:], dict.fromkeys(("vm", "privileged", "interactive", "tty"), False)
    while words and words[0] in FLAGS:
        flags.update(dict.fromkeys(FLAGS[words.pop(0)], True))
    words = words[:1] + words[2 if words[1:2] == ["--"] else 1 :]
    if len(words) < 2 or any(not word or word.startswith("-") for word in words[:2]):
        return None
    return Arguments(
        fcvm_command="exec", base_dir=None, log=None, name=None, pid=None, env=[], user=None, workdir=None, words=words, parser=None, **flags
    )  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    import argparse

    from fcvm.cli.completions import first_is_vm

    parser.usage = "fcvm exec [OPTIONS] NAME [--] COMMAND ..."
    target.configure(parser)
    add = parser.add_argument
    add("--vm", action="store_true", help="in the guest OS instead of the container")
    add("--interactive", "-i", action="store_true", help="pass our stdin on")
    add("--tty", "-t", action="store_true", help="give the command a terminal (a shell on a terminal has -it anyway)")
    add(
        "--env",
        "-e",
        action="append",
        default=[],
        metavar="K=V",
        help="environment variable; K=V,K2=V2 lists; K alone: from ours",
    )
    add("--user", "-u", metavar="USER[:GROUP]", help="user of the command (default: the container's)")
    add("--workdir", "-w", metavar="DIR", help="working directory (default: the container's)")
    add("--privileged", action="store_true", help="all capabilities")
    words = add("words", nargs=argparse.REMAINDER, metavar="NAME [--] COMMAND ...", help="the VM, then the command")
    words.completer = first_is_vm  # type: ignore[attr-defined]
    parser.set_defaults(parser=parser)


def prepare(args: argparse.Namespace, context: Context) -> None:
    target.take_name(args)
    parser = vars(args).pop("parser")
    if args.words[:1] and args.words[0].startswith("-"):  # options may also stand behind the name: exec NAME --vm -- ls
        parser.parse_args(args.words, args)
        del args.parser
    if args.words[:1] == ["--"]:
        args.words.pop(0)
    if not args.words:
        raise UsageError("No command is given.", hint=f"fcvm exec {args.name or f'--pid {args.pid}'} -- sh")
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if len(args.words) == 1 and os.path.basename(args.words[0]) in SHELLS and on_terminal:
        args.interactive = args.tty = True
    if args.tty and args.interactive and not sys.stdin.isatty():
        raise UsageError("--tty needs a terminal on stdin.", hint="use -i alone to pipe data in")
    if args.env:
        from fcvm.cli import values

        args.env = values.pairs(args.env, "--env", environ=os.environ)
    else:
        args.env = {}
    if args.tty and "TERM" in os.environ:
        args.env.setdefault("TERM", os.environ["TERM"])


def is_here(args: argparse.Namespace, context: Context) -> bool:
    """Whether the VM lives on this host: then nobody need ask KVM, for which a VM is made and destroyed."""
    if context.config.machine == "always":
        return False
    try:
        args.found = target.find_vm(args, context.layout)
    except FcvmError:
        return False
    return True


def run(args: argparse.Namespace, context: Context) -> int:
    vm = vars(args).pop("found", None) or target.find_vm(args, context.layout)
    request = Request(
        args.words,
        target="vm" if args.vm else "container",
        env=args.env,
        cwd=args.workdir,
        user=args.user,
        tty=args.tty,
        stdin=args.interactive,
        privileged=args.privileged,
    )
    try:
        end = sessions.stream(
            os.path.join(context.layout.place("vms"), vm.id),
            request,
            stdin=0 if args.interactive else None,
            terminal=next(filter(os.isatty, (0, 1, 2)), None) if args.tty else None,
            signals=FORWARDED,
        )
    except (FileNotFoundError, ConnectionRefusedError) as error:
        state.sweep(context.layout)
        raise ContainerError(f"The VM {vm.name!r} has just ended.", hint="fcvm ls --all") from error
    if end.message:
        raise ContainerError(end.message, exit_code=end.code)
    return end.code
