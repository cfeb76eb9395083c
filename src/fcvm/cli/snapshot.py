"""`fcvm snapshot`: take a snapshot of a running VM, and run clones of it."""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable

from fcvm.cli import values
from fcvm.cli.context import Context
from fcvm.errors import FcvmError, UsageError
from fcvm.snapshots.tags import check_tag, tag_names

WHERE = "vms"
MOST = 10_000  # clones in one call


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="COMMAND", required=True, title="commands")
    create = actions.add_parser(
        "create", help="take a snapshot of a VM, which runs on", usage="fcvm snapshot create [OPTIONS] NAME --tag TAG"
    )
    create.add_argument("--name", metavar="NAME", help="the VM's name or id").completer = _vm_names  # type: ignore[attr-defined]
    create.add_argument("--pid", metavar="PID", help="the VM's pid, as `fcvm ls` shows it")
    create.add_argument("--tag", required=True, metavar="TAG", help="name of the snapshot")
    create.add_argument("words", nargs="*", metavar="NAME")
    _configure_serve(actions.add_parser("serve", help="keep clones of a snapshot ready"))
    _configure_run(actions.add_parser("run", help="run a clone, or many"))
    listing = actions.add_parser("ls", help="list clone servers")
    listing.add_argument("--json", action="store_true", help="an array of objects")
    stop = actions.add_parser("stop", help="end clone servers and their clones")
    stop.add_argument("servers", nargs="*", metavar="PID|TAG", help="by pid, or all that serve a snapshot").completer = tag_names  # type: ignore[attr-defined]
    stop.add_argument("--all", "-a", action="store_true", help="all clone servers")
    verify = actions.add_parser("verify", help="start two clones and check that each is itself")
    verify.add_argument("tag", metavar="TAG").completer = tag_names  # type: ignore[attr-defined]


def _vm_names(**_: object) -> list[str]:
    from fcvm.cli.completions import vm_names

    return vm_names()


def _configure_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Keep loaded clones of a snapshot ready, so that `fcvm snapshot run --pid` only has to resume one. Prints the pid "
        "when it is ready. SIGTERM and `fcvm snapshot stop` end the server and its clones; so does Ctrl-C, twice if clones run."
    )
    add = parser.add_argument
    add("tag", metavar="TAG").completer = tag_names  # type: ignore[attr-defined]
    add(
        "--pool",
        default="1-16",
        metavar="N|MIN-MAX",
        help="clones to keep ready: N, or as many as were taken lately within limits (default: 1-16)",
    )
    add(
        "--backend",
        default="file",
        choices=("file", "uffd"),
        help="where memory comes from. file (default): mapped from the snapshot, shared by all clones in the page cache; best with warm caches and for many clones. uffd: served page by page; best from cold or remote storage (a network file system), with --prefetch. Guests on huge pages, and memory sent by another host, would need uffd, and fcvm has neither: all pages are of 4 KiB",
    )
    add(
        "--prefetch",
        action="store_true",
        help="have the pages that a clone needs first there before it asks. uffd: those that the first clone used are brought into the others, and kept for later servers. file: the kernel reads ahead what an uffd server has kept, or all memory",
    )
    add(
        "--network",
        metavar="MODE",
        choices=("rootless", "bridged", "none"),
        help="network of the clones (default: that of the snapshot)",
    )
    add("--detach", "-d", action="store_true", help="serve in the background; print the pid")


def _configure_run(parser: argparse.ArgumentParser) -> None:
    parser.description = "Run a clone of a snapshot until its container ends, or until this command does."
    add = parser.add_argument
    add("--pid", metavar="PID", help="of the clone server, as `fcvm snapshot ls` shows it")
    snapshot = add("--snapshot", metavar="TAG", help="without a server: load the snapshot for this clone")
    snapshot.completer = tag_names  # type: ignore[attr-defined]
    add("--name", metavar="NAME", help="name of the VM (default: made up)")
    add(
        "--exec",
        metavar="COMMAND",
        help="run a command in the clone's container, print its output, and end the clone; the exit code is the command's",
    )
    text = f"a fleet: so many clones, {MOST} at most, named NAME-1 to NAME-N; prints their names, not their output"
    add("--count", metavar="N", help=text)
    add(
        "--publish",
        "-p",
        action="append",
        default=[],
        metavar="[IP:][HOST:]GUEST[/udp]",
        help="publish a port; with --count, a range of N ports of the host gives one to each clone",
    )
    add(
        "--network",
        metavar="MODE",
        choices=("rootless", "bridged", "none"),
        help="another network than the server's, or the snapshot's; the server has no such clone ready and loads it then",
    )
    add("--detach", "-d", action="store_true", help="print the name and return; the clone lives as long as the server")
    add(
        "--log-prefix",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="begin lines with [ctr:out] or [ctr:err] (default: on a terminal)",
    )


def prepare(args: argparse.Namespace, context: Context) -> None:
    if args.action == "create":
        from fcvm.cli import target

        check_tag(args.tag)
        target.take_name(args)
        if args.words:
            raise UsageError("One VM at a time is snapshotted.", hint="fcvm snapshot create NAME --tag TAG")
    elif args.action in ("serve", "verify"):
        check_tag(args.tag)
        if args.action == "serve":
            args.minimum, args.maximum = pool_size(args.pool)
    elif args.action == "run":
        _prepare_run(args)
    elif args.action == "stop" and args.all == bool(args.servers):
        raise UsageError("Name clone servers, or say --all.", hint="fcvm snapshot ls")


def pool_size(text: str) -> tuple[int, int]:
    """``--pool``: ``N`` or ``MIN-MAX``; raises UsageError."""
    low, dash, high = text.partition("-")
    minimum = values.number(low, "--pool")
    maximum = values.number(high, "--pool") if dash else minimum
    if maximum < minimum:
        raise UsageError(f"--pool {text}: the limits are the wrong way round.", hint=f"--pool {maximum}-{minimum}")
    return minimum, maximum


def _prepare_run(args: argparse.Namespace) -> None:
    if (args.pid is None) == (args.snapshot is None):
        raise UsageError("Say what to clone: a server by --pid, or a snapshot by --snapshot.", hint="fcvm snapshot ls")
    if args.pid is not None:
        args.pid = values.number(args.pid, "--pid", least=1)
    else:
        check_tag(args.snapshot)
    args.fleet = args.count is not None
    args.count = values.number(args.count, "--count", least=1) if args.fleet else 1
    if args.count > MOST:
        raise UsageError(f"A fleet has at most {MOST} clones, not {args.count}.", hint=f"--count {MOST}")
    for option, wanted in (("--count", args.fleet), ("--detach", args.detach)):
        if wanted and args.snapshot is not None:
            raise UsageError(f"{option} needs a clone server.", hint=f"fcvm snapshot serve -d {args.snapshot}")
        if wanted and args.exec is not None:
            raise UsageError(f"--exec and {option} do not go together.", hint="fcvm exec runs commands in clones")
    if args.log_prefix is not None and (args.fleet or args.detach or args.exec is not None):
        raise UsageError("The clone's own output is not shown.", hint="leave out --log-prefix; fcvm logs NAME")
    if args.name is not None:
        from fcvm.vm.state import check_name

        check_name(args.name)
    args.command = values.words(args.exec, "--exec") if args.exec is not None else None
    if args.command == []:
        raise UsageError("--exec is given no command.", hint="--exec 'echo ready'")
    args.publish = distributed(args.publish, args.count)


def distributed(publish: list[str], count: int) -> list[list[str]]:
    """The ports of each of ``count`` clones: a range of ``count`` ports of the host gives one to each.

    Raises:
        UsageError: clones would have to share a port of the host.
    """
    shares: list[list[str]] = [[] for _ in range(count)]
    for text in publish:
        for word in text.split(",") if count > 1 else [text]:
            host, colon, guest = word.rpartition(":")
            ip, ip_colon, port = host.rpartition(":")
            low, dash, high = port.partition("-")
            for number, share in enumerate(shares):
                if count == 1 or not colon or port in ("", "0"):
                    share.append(word)
                elif dash and re.fullmatch("[0-9]{1,5}-[0-9]{1,5}", port) and int(high) - int(low) + 1 == count:
                    share.append(f"{ip}{ip_colon}{int(low) + number}:{guest}")
                else:
                    raise UsageError(
                        f"--publish {word}: {count} clones cannot share a port of the host.",
                        hint=f"--publish 8081-{8080 + count}:{guest.partition('-')[0]}",
                    )
    return shares


def run(args: argparse.Namespace, context: Context) -> int:
    actions = {"create": _create, "serve": _serve, "run": _run, "ls": _ls, "stop": _stop, "verify": _verify}
    return actions[args.action](args, context)


def _run(args: argparse.Namespace, context: Context) -> int:
    from fcvm.snapshots import client

    names = [args.name]
    if args.fleet:
        names = [f"{args.name}-{n}" if args.name else None for n in range(1, args.count + 1)]
    wanted = [
        client.Wanted(name, publish, args.network, args.log_prefix)
        for name, publish in zip(names, args.publish, strict=True)
    ]
    if args.snapshot is not None:
        from fcvm import host
        from fcvm.snapshots import direct

        host.need_kvm()
        return direct.run(args.snapshot, wanted[0], context.config, command=args.command)
    if args.command is not None:
        return client.execute(context.layout, args.pid, wanted[0], args.command)
    return client.run(context.layout, args.pid, wanted, attached=not (args.fleet or args.detach), detach=args.detach)


def _create(args: argparse.Namespace, context: Context) -> int:
    from fcvm.cli import target
    from fcvm.vm import rpc

    vm = target.find_vm(args, context.layout)
    answer = rpc.call(context.layout.vms / vm.id, {"op": "snapshot", "tag": args.tag})
    if answer is None:
        raise FcvmError(f"The VM {vm.name!r} ended meanwhile.", hint="fcvm ls --all")
    print(args.tag)
    if sys.stderr.isatty():
        took = answer["timings"]
        print(
            f"{took['kind']} snapshot of {vm.name}, which stood still for {took['paused'] * 1000:.0f} ms.",
            file=sys.stderr,
        )
    return 0


def _serve(args: argparse.Namespace, context: Context) -> int:
    from fcvm import host, setup
    from fcvm.snapshots import server

    host.need_kvm()
    settings = server.Settings(
        tag=args.tag,
        backend=args.backend,
        minimum=args.minimum,
        maximum=args.maximum,
        prefetch=args.prefetch,
        network=args.network,
    )
    assets = setup.find(context.config, context.layout)

    def ready() -> None:
        print(os.getpid(), flush=True)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if args.detach:
        from fcvm.vm.background import detached

        def live(ready: Callable[[], None]) -> int:
            server.serve(settings, context.config, assets, ready=ready, say=say)
            return 0

        print(detached("The clone server", live, hint="FCVM_LOG=debug fcvm snapshot serve TAG"))
    else:
        server.serve(settings, context.config, assets, ready=ready, say=say)
    return 0


def _ls(args: argparse.Namespace, context: Context) -> int:
    from fcvm.cli.ls import age, table
    from fcvm.snapshots import servers

    found = servers.running(context.layout)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    rows: list[tuple[str, ...]] = [
        ("PID", "SNAPSHOT", "CLONES", "READY", "TAKEN", "BACKEND", "FAULTS", "NETWORK", "UP")
    ]
    rows += [
        (
            str(s["pid"]),
            s["tag"],
            str(len(s["clones"])),
            f"{s['ready']}/{s['target']}",
            str(s["taken"]),
            s["backend"],
            "-" if s["faults"] is None else str(s["faults"]),
            s["network"],
            age(time.time() - s["created_at"]),
        )
        for s in found
    ]
    print(table(rows))
    return 0


def _stop(args: argparse.Namespace, context: Context) -> int:
    from fcvm.snapshots import servers

    if args.all:
        found = servers.pids(context.layout)
    else:
        found = [pid for word in args.servers for pid in servers.find(context.layout, word)]
    failed: list[FcvmError] = []
    for pid in dict.fromkeys(found):
        try:
            servers.stop(context.layout, pid)
            print(pid)
        except FcvmError as error:
            failed.append(error)
    if failed:
        raise failed[0]  # the others being stopped
    return 0


def _verify(args: argparse.Namespace, context: Context) -> int:
    from fcvm import host
    from fcvm.snapshots import verify

    host.need_kvm()
    failed = 0
    for check in verify.verify(args.tag, context.config):
        print(
            f"{'ok' if check.passed else 'FAILED':<7} {check.name}{f': {check.detail}' if check.detail else ''}",
            flush=True,
        )
        failed += not check.passed
    return 1 if failed else 0
