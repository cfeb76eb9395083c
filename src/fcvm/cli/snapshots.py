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
    importing.add_argument("file", metavar="FILE")
    importing.add_argument("tag", metavar="TAG", help="its name here")


def prepare(args: argparse.Namespace, context: Context) -> None:
    if args.action in ("export", "import"):
        check_tag(args.tag)
        if args.file != "-":
            args.file = os.path.abspath(args.file)
        elif args.action == "import":
            raise UsageError(
                "A snapshot is imported from a file, not from stdin.", hint="fcvm snapshots import FILE TAG"
            )
        elif sys.stdout.isatty():
            raise UsageError("An archive is not written to a terminal.", hint="fcvm snapshots export TAG FILE")


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
    elif args.action == "export":
        from fcvm.snapshots import archive

        archive.export(layout, args.tag, None if args.file == "-" else hostpath.resolve(args.file))
    elif args.action == "import":
        from fcvm.snapshots import archive

        print(archive.import_archive(layout, hostpath.resolve(args.file), args.tag).tag)
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
