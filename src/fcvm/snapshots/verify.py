"""`fcvm snapshot verify`: start two clones at the same time and see that each is itself, and works."""

import time
from collections.abc import Iterator

from fc_agent.structs import Struct
from fcvm.config import Config
from fcvm.errors import FcvmError
from fcvm.snapshots import direct
from fcvm.snapshots.client import Wanted
from fcvm.vm.state import new_id
from fcvm.vm.supervisor import Supervisor

CLOCK = 0.010  # seconds that a clone's clock may be off

# A DNS query (RFC 1035) for localhost's address to the guest's resolver, whose identifier comes back: an answer shows that the guest's network is its own (ARP, routes, resolver).
DNS = (
    "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(10);"
    "s.sendto(bytes.fromhex('123401000001000000000000096c6f63616c686f73740000010001'), ('10.0.2.3', 53));"
    "print(s.recv(512)[:2].hex())"
)


class Check(Struct):
    """One thing that was checked; ``detail`` says what was found."""

    name: str
    passed: bool
    detail: str = ""


def verify(tag: str, config: Config) -> Iterator[Check]:
    """Start two clones of the snapshot and check them; yields each check as it is done.

    Raises:
        FcvmError: the snapshot is not there.
    """
    suffix = new_id()[:6]
    names = [f"verify-{suffix}-1", f"verify-{suffix}-2"]
    with (
        direct.running(tag, Wanted(names[0], []), config) as one,
        direct.running(tag, Wanted(names[1], []), config) as other,
    ):
        yield Check("two clones run", True, f"{names[0]}, {names[1]}")
        for what, command in (
            ("random bytes differ", "head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \\n'"),
            ("UUIDs differ", "cat /proc/sys/kernel/random/uuid"),
            ("machine ids differ", "cat /etc/machine-id"),
        ):
            found = [_ask(clone, command) for clone in (one, other)]
            yield Check(what, found[0] != found[1] and all(len(text) >= 32 for text in found), " | ".join(found))
        for clone in (one, other):
            yield from _alone(clone)


def _alone(clone: Supervisor) -> Iterator[Check]:
    """What is checked of each clone."""
    name = clone.spec.name
    found = _ask(clone, "hostname")
    yield Check(f"{name}: host name", found == name, found)
    found = _ask(clone, "cat /etc/hosts")
    yield Check(f"{name}: /etc/hosts", name in found.split(), "" if name in found.split() else found)
    before = time.time()
    found = _ask(clone, "date +%s.%N")
    after = time.time()
    try:
        off = max(before - float(found), float(found) - after, 0.0)
    except ValueError:
        off = float("inf")
    yield Check(f"{name}: clock", off <= CLOCK, "right" if off == 0 else f"{off * 1000:.1f} ms off")
    if clone.network.spec.mode != "none":
        found = _ask(clone, f'python3 -ISE -c "{DNS}"')
        yield Check(f"{name}: network and DNS answer", found == "1234", "" if found == "1234" else found)
    found = _ask(clone, "echo works", target="container")
    yield Check(f"{name}: exec in the container", found == "works", "" if found == "works" else found)


def _ask(clone: Supervisor, command: str, *, target: str = "vm") -> str:
    """What a shell command prints in the guest; its error if it fails."""
    output: list[bytes] = []
    try:
        end = direct.execute(
            clone, ["sh", "-c", command], target=target, on_output=lambda stream, data: output.append(data)
        )
    except FcvmError as error:
        return error.message
    text = b"".join(output).decode(errors="replace").strip()
    return text if end.code == 0 else f"{text} (exit code {end.code}) {end.message or ''}".strip()
