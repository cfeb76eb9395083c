"""`fcvm rm`: remove VMs that have ended and were kept by --no-rm, with their logs."""

import argparse

from fcvm.cli.completions import vm_names
from fcvm.cli.context import Context
from fcvm.cli.each import each
from fcvm.errors import ConflictError, UsageError
from fcvm.vm import state

WHERE = "vms"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", "-a", action="store_true", help="all that have ended")
    parser.add_argument("names", nargs="*", metavar="NAME").completer = vm_names  # type: ignore[attr-defined]


def prepare(args: argparse.Namespace, context: Context) -> None:
    if args.all == bool(args.names):
        raise UsageError("Name VMs, or say --all.", hint="fcvm ls --all")


def run(args: argparse.Namespace, context: Context) -> int:
    layout = context.layout
    state.sweep(layout)

    def remove(name: str) -> None:
        record = state.find(layout, name=name, alive=False)
        if state.is_alive(layout, record.id):
            raise ConflictError(f"The VM {record.name!r} is running.", hint=f"fcvm stop {record.name}")
        state.forget(layout, record.id)
        print(record.name)

    if args.all:
        args.names = [record.name for record in state.records(layout) if not state.is_alive(layout, record.id)]
    each(args.names, remove)
    return 0
