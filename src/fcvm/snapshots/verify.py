"""`fcvm snapshot verify`: start two clones at the same time and see that each is itself, and works."""

import os
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
QUESTIONS = 20  # at most, to its clock

# A DNS query (RFC 1035) for localhost's address to the guest's resolver, whose identifier comes back, and a new TCP connection to it:
# an answer shows that the guest's network is its own (ARP, routes, resolver).
NETWORK = (
    "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(10);"
    "s.sendto(bytes.fromhex('123401000001000000000000096c6f63616c686f73740000010001'), ('10.0.2.3', 53));"
    "print(s.recv(512)[:2].hex(), end=' '); socket.create_connection(('10.0.2.3', 53), 10); print('connected')"
)
TIME = "import sys, time\nwhile sys.stdin.readline(): print(time.time_ns(), flush=True)"


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
    for path in ("/etc/hostname", "/etc/hosts"):
        found = _ask(clone, f"cat {path}")
        yield Check(f"{name}: {path}", name in found.split(), "" if name in found.split() else found)
    yield _clock(clone)
    if clone.network.spec.mode != "none":
        found = _ask(clone, f'python3 -ISE -c "{NETWORK}"')
        yield Check(f"{name}: DNS answers, new connections work", found == "1234 connected", found)
    found = _ask(clone, "echo works", target="container")
    if found.startswith("There is no program"):  # an image without a shell; that is the runtime's answer from inside the container
        found = "works"
    yield Check(f"{name}: exec in the container", found == "works", "" if found == "works" else found)


def _clock(clone: Supervisor) -> Check:
    """Asks for the time until it is known well enough; see ``fcvm.vm.clock`` for the reasoning."""
    questions, asking = os.pipe()
    pen = open(asking, "wb", buffering=0)  # noqa: SIM115
    sent = time.time_ns()
    found: list[tuple[float, float]] = []  # (how uncertain, how far off), seconds

    def answered(stream: str, data: bytes) -> None:
        nonlocal sent
        now = time.time_ns()
        found.append(((now - sent) / 2e9, (int(data) - (now + sent) / 2) / 1e9))
        if sum(map(abs, min(found))) > CLOCK and len(found) < QUESTIONS:
            sent = time.time_ns()
            pen.write(b"\n")
        else:
            pen.close()

    pen.write(b"\n")
    try:
        direct.execute(clone, ["python3", "-ISE", "-c", TIME], target="vm", on_output=answered, stdin=questions)
        uncertain, off = min(found)
    except (FcvmError, ValueError) as error:
        return Check(f"{clone.spec.name}: clock", False, str(error))
    finally:
        os.close(questions)
        pen.close()
    detail = f"{off * 1000:+.1f} ms, give or take {uncertain * 1000:.1f} ms"
    return Check(f"{clone.spec.name}: clock", abs(off) <= CLOCK + uncertain, detail)


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
