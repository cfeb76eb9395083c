"""``python -m fuse_pipe serve DIR --socket S [--ro]`` and ``python -m fuse_pipe mount S MOUNTPOINT``."""

import argparse
import logging
import signal
import socket
import sys

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
        "--owner", default="0:0", metavar="UID:GID", help="as whom the serving user's files show, when not root"
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
    mount.add_argument("--channels", type=int, default=1, help="requests that are carried at a time")
    args = parser.parse_args(arguments)
    logging.basicConfig(format="fuse_pipe: %(message)s", level=logging.WARNING)
    try:
        return _serve(args) if args.command == "serve" else _mount(args)
    except (OSError, FusePipeError) as error:
        print(f"fuse_pipe: {error}", file=sys.stderr)
        return 1


def _serve(args: argparse.Namespace) -> int:
    from fuse_pipe.server import listening, serve

    uid, _, gid = args.owner.partition(":")
    with listening(args.socket) as listener:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: listener.shutdown(socket.SHUT_RDWR))
        serve(
            listener,
            args.directory,
            read_only=args.ro,
            owner=(int(uid), int(gid or uid)),
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
    relay.mount()
    relay.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
