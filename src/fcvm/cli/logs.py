"""`fcvm logs`: what a VM's container has written, stdout and stderr apart, byte for byte."""

import argparse

from fcvm.cli import target
from fcvm.cli.completions import vm_names
from fcvm.cli.context import Context
from fcvm.errors import UsageError
from fcvm.vm import output, state

WHERE = "vms"


def configure(parser: argparse.ArgumentParser) -> None:
    target.configure(parser)
    parser.add_argument("--follow", "-f", action="store_true", help="go on until the container ends")
    parser.add_argument("--console", action="store_true", help="the VM's console instead: kernel and agent")
    parser.add_argument("words", nargs="*", metavar="NAME").completer = vm_names  # type: ignore[attr-defined]


def prepare(args: argparse.Namespace, context: Context) -> None:
    target.take_name(args)
    if args.words:
        raise UsageError(f"Too many words: {' '.join(args.words)}.", hint="fcvm logs NAME")


def run(args: argparse.Namespace, context: Context) -> int:
    state.sweep(context.layout)
    directory = context.layout.vms / target.find_vm(args, context.layout, alive=False).id
    if args.console:
        from fcvm.firecracker.process import CONSOLE

        for name in (f"{CONSOLE}.1", CONSOLE):
            if (directory / name).exists():
                output.write_all(1, (directory / name).read_bytes())
        return 0
    for _, stream, data in output.follow_log(directory) if args.follow else output.read_log(directory):
        output.write_all(1 if stream == "stdout" else 2, data)
    return 0
