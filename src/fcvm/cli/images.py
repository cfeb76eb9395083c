"""`fcvm images`: the images that are here."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime

from fc_agent import structs
from fcvm.cli.context import Context
from fcvm.cli.each import each
from fcvm.cli.ls import age, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fcvm.images.store import Image

WHERE = "here"

SCHEMA = 1


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("ls", help="list the images that are here")
    listing.add_argument("--json", action="store_true", help="an array of objects; docs/images.md describes the fields")
    pull = actions.add_parser("pull", help="fetch an image, or whatever is newer than what is here")
    pull.add_argument("reference", metavar="REFERENCE", help="any image reference; docs/images.md has the kinds")
    load = actions.add_parser("load", help="load images from a file or directory")
    load.add_argument(
        "file", metavar="FILE", help="from docker save, podman save or skopeo; an archive, or a directory"
    )
    load.add_argument("--name", help="what to call it, for example localhost/x (default: the names in the file)")
    remove = actions.add_parser("rm", help="remove names, and images with their last name")
    remove.add_argument("names", nargs="+", metavar="NAME", help="a name, or an image's id")
    prune = actions.add_parser("prune", help="remove the images that have no name and are not in use")
    prune.add_argument("--all", "-a", action="store_true", help="also those that have a name")
    prune.add_argument("--json", action="store_true", help="what was removed, as `ls --json` shows it")


def run(args: argparse.Namespace, context: Context) -> int:
    return {"ls": _ls, "pull": _pull, "load": _load, "rm": _rm, "prune": _prune}[args.action](args, context)


def _ls(args: argparse.Namespace, context: Context) -> int:
    from fcvm.images import store

    found = list(store.images(context.layout))
    if args.json:
        print(json.dumps([_public(image, names) for image, names in found], indent=2))
        return 0
    rows: list[tuple[str, ...]] = [("NAME", "IMAGE ID", "CREATED", "SIZE")]
    for image, names in found:
        rows += [(name, image.id[7:19], _age(image.created), _size(image.size_bytes)) for name in names or ["<none>"]]
    print(table(rows))
    return 0


def _pull(args: argparse.Namespace, context: Context) -> int:
    from fcvm.images import resolve

    print(resolve.ensure(args.reference, pull="always", layout=context.layout).id[7:])
    return 0


def _load(args: argparse.Namespace, context: Context) -> int:
    from fcvm.images import load

    for image in load.load(args.file, context.layout, name=args.name):
        print(image.reference)
    return 0


def _rm(args: argparse.Namespace, context: Context) -> int:
    from fcvm.images import store

    used = _used(context)

    def remove(name: str) -> None:
        removed, last = store.untag(context.layout, name, used=used)
        print(f"{'removed' if last else 'untagged'} {removed}")

    each(args.names, remove)
    return 0


def _prune(args: argparse.Namespace, context: Context) -> int:
    """Remove images here, then the machine's copies of images that are not here any more.

    In the machine no image has a name; ``args.keep`` has the keys of those that its host has.
    """
    from fcvm.images import store, work

    keep: list[str] | None = getattr(args, "keep", None)
    work.sweep(context.layout)
    gone = store.prune(context.layout, everything=args.all, used=_used(context) | set(keep or ()))
    if keep is not None:
        return 0
    _prune_machine(args, context)
    if args.json:
        print(json.dumps([_public(image, []) for image in gone], indent=2))
        return 0
    for image in gone:
        print(image.id[7:])
    print(f"{len(gone)} images removed, {_size(sum(image.size_bytes for image in gone))} freed", file=sys.stderr)
    return 0


def _prune_machine(args: argparse.Namespace, context: Context) -> None:
    """Let the machine do the same, if there is one and it runs."""
    from fcvm import host

    if not host.uses_machine(context.config):
        return
    from fcvm.machine.machine import Machine

    if Machine(context.config, context.layout).status().phase == "running":
        from fcvm.cli.remote import forward
        from fcvm.images import store

        args.keep = [image.key for image, _ in store.images(context.layout)]
        forward(args, context)


def _used(context: Context) -> set[str]:
    """The keys of the images that snapshots need; they name their disks relative to the data directory.

    Those that VMs need are seen in the VMs' directories by the store itself.
    """
    from pathlib import PurePath

    from fcvm.snapshots import store as snapshots
    from fcvm.vm import state

    state.sweep(context.layout)  # a VM that is gone uses nothing
    disks = [PurePath(path) for found in snapshots.snapshots(context.layout) for path in found.manifest.disks.values()]
    return {path.stem for path in disks if path.parent.name == "images"}


def _public(image: Image, names: list[str]) -> dict[str, Any]:
    values = structs.asdict(image)
    del values["reference"]
    return {"schema": SCHEMA, "names": names, **values, "path": str(image.path)}


def _age(created: str) -> str:
    """How long ago; reproducible images have the epoch or nothing there, which says nothing."""
    try:
        made = datetime.fromisoformat(created).astimezone(UTC)
    except (ValueError, OverflowError):
        return "-"
    return f"{age((datetime.now(UTC) - made).total_seconds())} ago" if made.year > 1980 else "-"


def _size(count: int) -> str:
    from fcvm.setup.progress import size

    return size(count)
