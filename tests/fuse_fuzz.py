"""Hostile messages for a server, seeded: what they are, and what must hold after each.

``python tests/fuse_fuzz.py --rounds N --seed S`` runs for longer than the test does; it needs no root, but as root it
also tries what only root could do.
"""

import argparse
import contextlib
import os
import random
import socket
import struct
import sys
import tempfile
from pathlib import Path

import fuse_support
from fuse_support import Client

from fuse_pipe import channel
from fuse_pipe import messages as m
from fuse_pipe.errors import FusePipeError
from fuse_pipe.server import Server

NUMBERS = (0, 1, 2, 7, 40, 255, 4095, 4096, 65535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
WIDE = (*NUMBERS, 1 << 32, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
NAMES = (
    b"f",
    b"d",
    b"l",
    b"fifo",
    b"new",
    b"..",
    b".",
    b"",
    b"/",
    b"../outside",
    b"/etc/passwd",
    b"d/x",
    b"n" * 255,
    b"n" * 256,
    b"n" * 1024,
    b"\xff\xfe",
    b"nul\0inside",
    b"out",
    b"user.x",
    b"trusted.y",
    b"system.posix_acl_access",
)
TARGETS = (b"/etc", b"../outside", b"f", b"", b"x" * 5000)
SECRET = b"not for the guest"


def tree(base: Path) -> tuple[Path, Path]:
    """The served directory, and one beside it that must stay as it is."""
    root, outside = base / "root", base / "outside"
    for path in (root, root / "d", outside):
        path.mkdir()
    (root / "f").write_bytes(b"content" * 1000)
    (root / "d" / "x").write_bytes(b"x")
    (root / "l").symlink_to("../outside/secret")
    (root / "out").symlink_to("../outside")
    os.mkfifo(root / "fifo")
    (outside / "secret").write_bytes(SECRET)
    return root, outside


class Attacker:
    """Makes messages out of a seeded generator and what the server has told so far."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.nodes = [0, m.ROOT_ID, 2, 1 << 40, (1 << 64) - 1]
        self.handles = [0, 1, 2, (1 << 64) - 1]
        self.unique = 2

    def number(self, letter: str) -> int:
        return self.random.choice(WIDE if letter in "Qq" else NUMBERS) & (
            (1 << (8 * struct.calcsize("<" + letter))) - 1
        )

    def fields(self, layout: m.Layout) -> list[int]:
        values = []
        for name, letter in zip(layout.fields, layout.struct.format[1:], strict=True):
            if name in ("fh", "fh_in", "fh_out") and self.random.random() < 0.9:
                values.append(self.random.choice(self.handles))
            elif name in ("nodeid", "newdir", "oldnodeid", "nodeid_out") and self.random.random() < 0.9:
                values.append(self.random.choice(self.nodes))
            elif name == "size" and self.random.random() < 0.8:
                values.append(self.random.choice((0, 1, 100, 4096, 70000)))
            elif name == "count":
                values.append(self.random.randrange(4))
            elif name in ("length", "len") and self.random.random() < 0.95:  # not to fill the disk
                values.append(self.random.choice((0, 1, 4096)))
            elif name == "offset" and self.random.random() < 0.8:
                values.append(self.random.choice((0, 1, 5000, (1 << 64) - 1)))
            else:
                values.append(self.number(letter))
        return values

    def body(self, opcode: int) -> bytes:
        request = m.REQUESTS[opcode]
        choose = self.random.choice
        body = b""
        values: list[int] = []
        if request.layout:
            values = self.fields(request.layout)
            body = request.layout.struct.pack(
                *(v if letter != "q" else 0 for v, letter in zip(values, request.layout.struct.format[1:], strict=True))
            )
        size = values[request.layout.fields.index("size")] if request.layout and "size" in request.layout.fields else 0
        if request.tail in ("name", "value"):
            body += choose(NAMES) + b"\0"
        elif request.tail == "names":
            body += choose(NAMES) + b"\0" + choose(NAMES + TARGETS) + b"\0"
        if request.tail in ("data", "value"):
            body += bytes(min(size, 100_000))
        elif request.tail == "records":
            assert request.record
            body += b"".join(request.record.pack(*self.fields(request.record)) for _ in range(values[0]))
        return body

    def message(self) -> bytes:
        """One message: mostly well-formed with hostile values, sometimes cut, longer than it says, or noise."""
        roll = self.random.random()
        self.unique += 2
        opcode = self.random.choice([o for o in m.REQUESTS if o not in (m.DESTROY,)])
        body = self.body(opcode)
        if roll < 0.10:
            body = body[: self.random.randrange(len(body) + 1)]
        elif roll < 0.15:
            body += self.random.randbytes(self.random.randrange(1, 50))
        elif roll < 0.20:
            body = self.random.randbytes(self.random.randrange(200))
        elif roll < 0.23:
            opcode = self.random.choice((0, 7, 19, 54, 999, 4096, (1 << 32) - 1, channel.ACK))
        length = m.IN_HEADER.size + len(body)
        if roll > 0.99:
            length = self.random.choice((0, 1, 39, length + 1, m.MAX_REQUEST + 1, (1 << 32) - 1))
        ids = [self.random.choice((0, 1000, (1 << 32) - 1)) for _ in range(3)]
        extension = self.random.choice((0, 0, 0, 0, 0, 0, 0, 1, 2, 65535))
        quiet = self.random.choice((0, 0, 0, 0, 0, 0, 0, 1, 256, 65535))
        return (
            m.IN_HEADER.pack(length, opcode, self.unique, self.random.choice(self.nodes), *ids, extension, quiet) + body
        )

    def learn(self, reply: bytes) -> None:
        """Node ids and handles out of whatever came back, to use them again."""
        if len(reply) >= 16 + m.OPEN_OUT.size:
            values = struct.unpack_from("<Q", reply, 16)
            (self.nodes if len(reply) >= 16 + m.ENTRY_OUT.size else self.handles).append(values[0])
            if len(reply) == 16 + m.ENTRY_OUT.size + m.OPEN_OUT.size:
                self.handles.append(m.OPEN_OUT.unpack_from(reply, 16 + m.ENTRY_OUT.size)[0])
        del self.nodes[5:-20], self.handles[4:-20]


def attack(server: Server, attacker: Attacker, count: int) -> int:
    """Send ``count`` messages over as many connections as that takes; how many replies came."""
    replies = 0
    while count > 0:
        name = f"attack{attacker.random.randrange(1 << 30)}"
        connected = Client(server, session=name, quiet=attacker.random.random() < 0.5)
        try:
            connected.init()
            connected.sock.settimeout(20)
            for _ in range(min(count, 200)):
                count -= 1
                message = attacker.message()
                connected.sock.sendall(message)
                opcode = m.IN_HEADER.unpack_from(message)[1]
                if not (
                    opcode in m.REQUESTS
                    and m.REQUESTS[opcode].replies
                    and opcode != m.SETLKW
                    and len(message) == message_length(message)
                    and not message[channel.QUIET_AT]
                ):
                    continue
                reply = connected.receive()
                attacker.learn(reply)
                replies += 1
        except (FusePipeError, OSError):
            pass  # the connection ended: that is allowed
        finally:
            with contextlib.suppress(OSError):
                connected.sock.shutdown(socket.SHUT_RDWR)
            connected.close()
    return replies


def message_length(message: bytes) -> int:
    return int(m.IN_HEADER.unpack_from(message)[0])


def check(server: Server, root: Path, outside: Path) -> None:
    """The server still serves, and nothing outside was read, changed or made."""
    assert sorted(os.listdir(outside)) == ["secret"]
    assert (outside / "secret").read_bytes() == SECRET
    assert os.stat(outside / "secret").st_nlink == 1
    (root / "alive").write_bytes(b"yes")
    connected = Client(server, session="check")
    connected.init()
    node = connected.lookup(b"alive").nodeid
    opened = connected.call(m.OPEN, node, flags=os.O_RDONLY)[0][0]
    assert connected.call(m.READ, node, fh=opened.fh, offset=0, size=100)[1] == b"yes"
    connected.call(m.DESTROY)
    connected.close()


def run(base: Path, seed: int, count: int, *, read_only: bool = False) -> int:
    """One round in a new directory; how many replies came."""
    root, outside = tree(base)
    before = sorted(os.walk(root)) if read_only else None
    server = Server(str(root), read_only=read_only)
    try:
        replies = attack(server, Attacker(seed), count)
        if read_only:
            assert sorted(os.walk(root)) == before
            assert (root / "f").read_bytes() == b"content" * 1000
        check(server, root, outside)
        return replies
    finally:
        server.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--messages", type=int, default=2000, help="in each round")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    args = parser.parse_args()
    for n in range(args.rounds):
        seed = args.seed + n
        with tempfile.TemporaryDirectory() as base:
            try:
                replies = run(Path(base), seed, args.messages, read_only=n % 4 == 3)
            except BaseException:
                print(f"failed with --seed {seed} --rounds 1 --messages {args.messages}", file=sys.stderr)
                raise
        print(f"seed {seed}: {args.messages} messages, {replies} replies", flush=True)
    return 0


if __name__ == "__main__":
    assert fuse_support
    sys.exit(main())
