"""`fcvm setup`: provides kernel, guest image, initrd, Firecracker and storage; does nothing where all is there."""

import argparse
import sys
from pathlib import Path

from fcvm.cli.context import Context

WHERE = "here"


class GenerateConfig(argparse.Action):
    """Prints and ends, as --version does: it is what errors of the settings refer to, and must work with any."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from fcvm.config import generate

        print(generate(), end="")
        parser.exit()


def configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--generate-config", action=GenerateConfig, nargs=0, help="print every setting with its default, as a configuration file"
    )
    what.add_argument("--storage-only", action="store_true", help="only make the data directory")
    parser.add_argument(
        "--inception", action="store_true", help="also make the disk for VMs that run VMs, and see whether they can here"
    )
    what.add_argument("--force", action="store_true", help="build everything anew, with today's packages")
    what.add_argument(
        "--from",
        dest="source",
        metavar="DIRECTORY",
        type=Path,
        help="copy from the data directory of another host (for a host without network)",
    )


def run(args: argparse.Namespace, context: Context) -> int:
    from fcvm import host
    from fcvm.setup import build, progress, storage

    config, layout = context.config, context.layout
    with progress.open() as shown:
        if args.storage_only:
            made = storage.ensure(layout.base, config.storage_size, shown)
        else:
            if args.source is not None:
                build.adopt(config, layout, args.source.absolute(), shown)
            assets = build.ensure(config, layout, shown, force=args.force)
            made = storage.examine(layout.base)
            if args.inception:
                from fcvm.nested import disk

                disk.ensure(layout, assets, shown)
    print(f"Data directory: {layout.base} ({made.detail}).", file=sys.stderr)
    if not args.storage_only:
        print(
            f"fcvm is set up: Linux {assets.kernel_version}, Firecracker {assets.firecracker_version}.", file=sys.stderr
        )
    if args.inception and not host.uses_machine(config):
        from fcvm.nested import profile

        profile.require_nesting()
    return 0
