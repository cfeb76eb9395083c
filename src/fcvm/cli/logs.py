"""`fcvm logs`: what a VM's container has written, stdout and stderr apart, byte for byte."""

import argparse

from fcvm.cli import target
from fcvm.cli.completions import vm_names
from fcvm.cli.context import Context
from fcvm.cli.values import moment, number
from fcvm.errors import UsageError
from fcvm.vm import lines, output, state

WHERE = "vms"


def configure(parser: argparse.ArgumentParser) -> None:
    target.configure(parser)
    parser.add_argument("--follow", "-f", action="store_true", help="go on until the container ends")
    parser.add_argument("--tail", metavar="N", help="only the newest N lines, and with --follow what comes after them")
    parser.add_argument("--since", metavar="TIME", help="only what is newer: 90s, 10m, 1h30m ago, or 2026-01-31T12:00:00")
    parser.add_argument("--timestamps", "-t", action="store_true", help="begin every line with its time (UTC)")
    parser.add_argument("--console", action="store_true", help="the VM's console instead: kernel and agent")
    parser.add_argument("words", nargs="*", metavar="NAME").completer = vm_names  # type: ignore[attr-defined]


def prepare(args: argparse.Namespace, context: Context) -> None:
    target.take_name(args)
    if args.words:
        raise UsageError(f"Too many words: {' '.join(args.words)}.", hint="fcvm logs NAME")
    args.tail = None if args.tail is None else number(args.tail, "--tail")
    args.since = None if args.since is None else moment(args.since, "--since")
    if args.console and (args.follow or args.timestamps or args.tail is not None or args.since is not None):
        raise UsageError("--console shows the console whole, and nothing else.", hint="fcvm logs --console NAME | tail")


def run(args: argparse.Namespace, context: Context) -> int:
    state.sweep(context.layout)
    directory = context.layout.vms / target.find_vm(args, context.layout, alive=False).id
    if args.console:
        from fcvm.firecracker.process import CONSOLE

        for name in (f"{CONSOLE}.1", CONSOLE):
            if (directory / name).exists():
                output.write_all(1, (directory / name).read_bytes())
        return 0
    records = output.follow_log(directory) if args.follow else output.read_log(directory)
    place = (args.since or 0, 0)
    if args.tail is not None:
        place = max(place, lines.newest(output.read_log(directory), args.tail))
    if place > (0, 0):
        records = lines.since(place, records)
    if args.timestamps:
        records = lines.stamped(records)
    for _, stream, data in records:
        output.write_all(1 if stream == "stdout" else 2, data)
    return 0
