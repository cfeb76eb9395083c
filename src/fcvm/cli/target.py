"""Naming a VM on the command line: ``NAME``, ``--name NAME`` or ``--pid PID``."""

from __future__ import annotations

from fcvm.errors import UsageError
from fcvm.vm.state import Record, find

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from fcvm.storage.layout import Layout


def configure(parser: argparse.ArgumentParser) -> None:
    """Add ``--name`` and ``--pid``."""
    from fcvm.cli.completions import vm_names

    name = parser.add_argument("--name", metavar="NAME", help="the VM's name or id")
    name.completer = vm_names  # type: ignore[attr-defined]
    parser.add_argument("--pid", metavar="PID", help="the VM's pid, as `fcvm ls` shows it")


def take_name(args: argparse.Namespace) -> None:
    """Settle which VM is meant: without ``--name`` and ``--pid`` the first of ``args.words`` is its name.

    Raises:
        UsageError: no VM, or two, are named.
    """
    if args.name is not None and args.pid is not None:
        raise UsageError("A VM is named twice: by --name and by --pid.", hint="leave one of them out")
    if args.pid is not None:
        from fcvm.cli.values import number

        args.pid = number(args.pid, "--pid", least=1)
    elif args.name is None:
        if args.words[:1] == ["--"]:
            args.words.pop(0)
        if not args.words:
            raise UsageError("No VM is named.", hint="fcvm ls shows the VMs that run")
        args.name = args.words.pop(0)


def find_vm(args: argparse.Namespace, layout: Layout, *, alive: bool = True) -> Record:
    """The VM that ``take_name`` settled on; raises NotFoundError."""
    return find(layout, name=args.name, pid=args.pid, alive=alive)
