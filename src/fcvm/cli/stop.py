"""`fcvm stop`: end VMs: the container's stop signal, then a kill after the timeout."""

import argparse
import time
from concurrent import futures

from fcvm.cli import target
from fcvm.cli.completions import vm_names
from fcvm.cli.context import Context
from fcvm.cli.each import each
from fcvm.cli.values import number
from fcvm.errors import NotFoundError, UsageError
from fcvm.vm import rpc, state

WHERE = "vms"
AT_ONCE = 64  # VMs; most of a stop is waiting for containers
AGAIN = 0.05  # seconds between attempts to reach a VM that begins or ends


def configure(parser: argparse.ArgumentParser) -> None:
    target.configure(parser)
    parser.add_argument(
        "--timeout", "-t", "--time", metavar="SECONDS", help="from stop signal to kill (default: the VM's own)"
    )
    parser.add_argument("--all", "-a", action="store_true", help="all VMs that run")
    parser.add_argument("words", nargs="*", metavar="NAME").completer = vm_names  # type: ignore[attr-defined]


def prepare(args: argparse.Namespace, context: Context) -> None:
    if args.timeout is not None:
        args.timeout = number(args.timeout, "--timeout")
    if not args.all:
        target.take_name(args)
    elif args.words or args.name is not None or args.pid is not None:
        raise UsageError("VMs are named, and --all is said.", hint="leave one of them out")


def run(args: argparse.Namespace, context: Context) -> int:
    layout = context.layout
    state.sweep(layout)
    known: dict[str, state.Record] = {}
    if args.all:
        known = {record.name: record for record in state.records(layout) if state.is_alive(layout, record.id)}
        names = list(known)
    elif args.pid is not None:
        names = [target.find_vm(args, layout).name, *args.words]
    else:
        names = [args.name, *args.words]

    def stop(name: str) -> str:
        record = known.get(name) or state.find(layout, name=name)
        while state.is_alive(layout, record.id):
            try:
                rpc.call(layout.vms / record.id, {"op": "stop", "timeout": args.timeout})
                state.wait_for_end(layout, record.id)  # one that was ending does not answer any more
            except NotFoundError:  # it does not listen any more, or not yet
                time.sleep(AGAIN)
        return record.name

    with futures.ThreadPoolExecutor(AT_ONCE) as threads:
        ends = {name: threads.submit(stop, name) for name in names}
        each(names, lambda name: print(ends[name].result(), flush=True))
    return 0
