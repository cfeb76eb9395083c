"""``python -m fuse_pipe serve DIR --socket S [--ro]`` and ``python -m fuse_pipe mount S MOUNTPOINT``."""

import argparse
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from fuse_pipe.channel import CHANNELS
from fuse_pipe.errors import FusePipeError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fuse_pipe", description="FUSE over a stream socket.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve a directory (or a file) on a Unix socket")
    serve.add_argument("directory")
    serve.add_argument("--socket", required=True, help="path of the Unix socket to make")
    serve.add_argument("--ro", action="store_true", help="change nothing, whatever a mount asks")
    serve.add_argument(
        "--owner",
        type=_owner,
        default=(0, 0),
        metavar="UID:GID",
        help="as whom the serving user's files show, when not root",
    )
    serve.add_argument(
        "--journals", metavar="DIR", help="where to note what mounts know, for a server that is started again"
    )
    serve.add_argument(
        "--writeback", action="store_true", help="mounts keep written data back: for directories nobody else changes"
    )
    mount = commands.add_parser("mount", help="mount what is served there, until it is unmounted or this is stopped")
    mount.add_argument("socket")
    mount.add_argument("mountpoint")
    mount.add_argument(
        "--channels", type=_channels, default=1, metavar="N", help=f"requests that are carried at a time, up to {CHANNELS}"
    )
    args = parser.parse_args(arguments)
    logging.basicConfig(format="fuse_pipe: %(message)s", level=logging.WARNING)
    try:
        return _serve(args) if args.command == "serve" else _mount(args)
    except (OSError, FusePipeError) as error:
        print(f"fuse_pipe: {error}", file=sys.stderr)
        return 1


def _owner(text: str) -> tuple[int, int]:
    uid, _, gid = text.partition(":")
    if not (uid.isdecimal() and (gid or uid).isdecimal() and max(int(uid), int(gid or uid)) < 1 << 32):
        raise argparse.ArgumentTypeError(f"{text!r} is not UID:GID in numbers, as in 1000:1000")
    return int(uid), int(gid or uid)


def _channels(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= CHANNELS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {CHANNELS}")
    return int(text)


def _serve(args: argparse.Namespace) -> int:
    from fuse_pipe.server import listening, serve

    if not os.path.exists(args.directory) and not (args.journals and any(Path(args.journals).glob("*.journal"))):
        raise FusePipeError(f"{args.directory} does not exist, and no mounts of it are noted; make it first")
    if os.path.exists(args.directory) and not (os.path.isdir(args.directory) or os.path.isfile(args.directory)):
        raise FusePipeError(f"{args.directory} is neither a directory nor a file; name its directory")
    with listening(args.socket) as listener:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: listener.shutdown(socket.SHUT_RDWR))
        serve(
            listener,
            args.directory,
            read_only=args.ro,
            owner=args.owner,
            writeback=args.writeback,
            journals=args.journals,
        )
    return 0


def _mount(args: argparse.Namespace) -> int:
    from fuse_pipe.relay import Relay

    def connect() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(args.socket)
        except BaseException:
            sock.close()
            raise
        return sock

    relay = Relay(connect, args.mountpoint, channels=args.channels)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: relay.unmount())
    try:
        relay.mount()
    except OSError as error:
        raise FusePipeError(f"{args.socket} cannot be mounted on {args.mountpoint}: {error.strerror}") from error
    relay.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
