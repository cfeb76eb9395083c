"""`fcvm snapshots`: the snapshots on disk."""

import argparse
import json
import os
import sys
import time

from fcvm import hostpath
from fcvm.cli.context import Context
from fcvm.cli.each import each
from fcvm.cli.ls import age, table
from fcvm.errors import UsageError
from fcvm.snapshots import store
from fcvm.snapshots.tags import check_tag, tag_names

WHERE = "vms"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="an array of objects")
    actions = parser.add_subparsers(dest="action", metavar="COMMAND", title="commands (default: ls)")
    listing = actions.add_parser("ls", help="list snapshots")
    listing.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="an array of objects")
    removal = actions.add_parser("rm", help="remove snapshots")
    removal.add_argument("tags", nargs="+", metavar="TAG").completer = tag_names  # type: ignore[attr-defined]
    pruning = actions.add_parser("prune", help="remove boot snapshots, warm starts, and what was left half-made")
    pruning.add_argument("--all", "-a", action="store_true", help="also those made by `fcvm snapshot create`")
    export = actions.add_parser("export", help="write a snapshot to one .tar.zst")
    export.add_argument("tag", metavar="TAG").completer = tag_names  # type: ignore[attr-defined]
    export.add_argument("file", metavar="FILE", help="- for stdout")
    importing = actions.add_parser("import", help="make a snapshot from an exported one")
    importing.add_argument("file", metavar="FILE", help="- for stdin")
    importing.add_argument("tag", metavar="TAG", help="its name here")


def prepare(args: argparse.Namespace, context: Context) -> None:
    if args.action not in ("export", "import"):
        return
    check_tag(args.tag)
    fd, words = (1, "written to") if args.action == "export" else (0, "read from")
    if args.file != "-":
        args.file = _as_stream(args.file, fd)
    if args.file == "-":
        if os.isatty(fd):
            raise UsageError(f"An archive is not {words} a terminal.", hint=f"fcvm snapshots {args.action} --help")
        args.interactive = args.action == "import"  # the machine is given our stdin


def _as_stream(path: str, fd: int) -> str:
    """Make a pipe or device our stdin or stdout, and return ``-``: in the machine it would be another one. Else its path.

    That is the path of the file itself, as an export would replace a link to it. What is our stdin or stdout already is used as
    it is: /dev/stdout may be a file.
    """
    real = os.path.realpath(path)
    if not os.path.exists(path) or os.path.isdir(path):
        return real
    if os.path.samefile(path, fd):
        return "-"
    if os.path.isfile(real):  # a deleted one, of which only a descriptor is left, has no path
        return real
    opened = os.open(path, os.O_WRONLY if fd else os.O_RDONLY)
    os.dup2(opened, fd)
    os.close(opened)
    return "-"


def run(args: argparse.Namespace, context: Context) -> int:
    layout = context.layout
    if args.action == "rm":

        def remove(tag: str) -> None:
            store.remove(layout, tag)
            print(tag)

        each(args.tags, remove)
    elif args.action == "prune":
        removed = store.prune(layout, everything=args.all)
        for tag, size in removed:
            print(f"{tag}  {megabytes(size)}")
        print(f"{megabytes(sum(size for _, size in removed))} freed.", file=sys.stderr)
    elif args.action in ("export", "import"):
        from fcvm.snapshots import archive

        path = None if args.file == "-" else hostpath.resolve(args.file)
        if args.action == "export":
            archive.export(layout, args.tag, path)
        else:
            print(archive.import_archive(layout, path, args.tag).tag)
    else:
        _list(args, context)
    return 0


def _list(args: argparse.Namespace, context: Context) -> None:
    store.sweep(context.layout)
    found = store.snapshots(context.layout)
    if args.json:
        print(json.dumps([public(context, snapshot) for snapshot in found], indent=2))
        return
    rows: list[tuple[str, ...]] = [("TAG", "KIND", "IMAGE", "CPU", "MEM", "NETWORK", "SIZE", "CREATED", "IN USE")]
    rows += [
        (
            snapshot.tag,
            snapshot.manifest.kind,
            snapshot.manifest.image.get("reference", "-"),
            str(snapshot.manifest.hardware.cpu),
            f"{snapshot.manifest.hardware.memory}M",
            snapshot.manifest.network,
            megabytes(snapshot.bytes_on_disk()),
            age(time.time() - snapshot.manifest.created_at),
            "yes" if store.in_use(context.layout, snapshot.tag) else "no",
        )
        for snapshot in found
    ]
    print(table(rows))
    readable = {snapshot.tag for snapshot in found}
    for tag in store.tags(context.layout):
        if tag not in readable:
            print(f"{tag} cannot be read; fcvm snapshots rm {tag} removes it.", file=sys.stderr)


def public(context: Context, snapshot: store.Snapshot) -> dict[str, object]:
    """A snapshot as JSON for users."""
    manifest = snapshot.manifest
    return {
        "tag": snapshot.tag,
        "kind": manifest.kind,
        "image": dict(manifest.image),
        "cpu": manifest.hardware.cpu,
        "memory_mib": manifest.hardware.memory,
        "network": manifest.network,
        "bytes": snapshot.bytes_on_disk(),
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(manifest.created_at)),
        "parent": manifest.parent,
        "firecracker": manifest.firecracker,
        "in_use": store.in_use(context.layout, snapshot.tag),
        "schema": manifest.schema,
    }


def megabytes(size: int) -> str:
    """``size`` bytes for people."""
    return f"{size / (1 << 20):.0f}M" if size < 10 << 30 else f"{size / (1 << 30):.1f}G"
