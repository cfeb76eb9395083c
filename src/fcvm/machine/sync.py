"""Gives the machine what its VMs need: fcvm's own code, and the kernel, images and Firecracker that setup has made.

All of it is named by content, so it is copied once and never changed. The copying is done by a process in the machine
(``receive.py``) that reads the host's files under ``/host``. ``Plan.key`` is noted in the runtime directory when it is
done; as long as it stays the same there is nothing to do.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import fcvm
from fcvm.agent.session import Request, stream
from fcvm.errors import MachineError
from fcvm.linux import sockets
from fcvm.machine.state import Places
from fcvm.setup.assets import Assets
from fcvm.storage.layout import locked

PACKAGES = ("fcvm", "fc_agent", "fuse_pipe")
SOURCES = Path(fcvm.__file__).parent.parent

# In the machine.
BASE = Path("/mnt/fcvm-btrfs")
HOST = Path("/host")
PYTHON = "/usr/bin/python3"
RECEIVE = "import sys; sys.path.insert(0, sys.argv[1]); from fcvm.machine.receive import main; main(sys.argv[2])"


@dataclass(frozen=True, slots=True)
class Plan:
    """What the machine is to have: ``files`` from the host's path to the machine's, and the code.

    Attributes:
        code: the directory of fcvm's packages in the machine.
        assets: there, the file that tells fcvm in the machine where the assets are (FCVM_ASSETS).
        content: of that file.
    """

    files: tuple[tuple[Path, Path], ...]
    code: Path
    assets: Path
    content: str

    @property
    def key(self) -> str:
        return f"{self.code.name} {self.assets.name}"


def plan(assets: Assets, base: Path) -> Plan:
    """What the machine needs of the host's ``assets``, those of the data directory ``base``."""
    there: dict[str, Path] = {}
    for name in ("vmlinux", "initrd", "root_image", "firecracker"):
        path: Path = getattr(assets, name)
        there[name] = BASE / path.relative_to(base) if path.is_relative_to(base) else BASE / "bin" / _identity(path) / path.name
    files = [(getattr(assets, name), path) for name, path in there.items()]
    jailer = assets.firecracker.with_name("jailer")
    if jailer.exists():
        files.append((jailer, there["firecracker"].with_name("jailer")))
    content = replace(assets, **there).to_json()
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    return Plan(tuple(files), BASE / "code" / code_key(), BASE / "cache" / f"assets-{key}.json", content)


def _identity(path: Path) -> str:
    """A name for a file that lies outside the data directory, so is not named by its content."""
    found = path.stat()
    return hashlib.sha256(f"{path} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()


def code_key(sources: Path = SOURCES) -> str:
    """Changes whenever a file of fcvm's packages does: a hash over their names, sizes and times."""
    state = hashlib.sha256()
    for package in PACKAGES:
        _add_directory(state, os.fspath(sources / package))
    return state.hexdigest()[:16]


def _add_directory(state: "hashlib._Hash", directory: str) -> None:
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                if entry.name != "__pycache__":
                    _add_directory(state, entry.path)
            else:
                found = entry.stat()
                state.update(f"{entry.path}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())


def synced(places: Places, plan: Plan) -> bool:
    """Whether the running machine has everything in ``plan``."""
    try:
        return (places.runtime / "synced").read_text() == plan.key
    except OSError:
        return False


def sync(places: Places, plan: Plan, user: str | None, note: Callable[[str], None]) -> None:
    """Bring the running machine up to ``plan``; ``note`` is told in a few words what is copied.

    Raises:
        MachineError: it could not be copied.
    """
    with locked(places.directory / "sync.lock"):
        if synced(places, plan):
            return
        work = {
            "files": [[str(HOST / source.relative_to("/")), str(target)] for source, target in plan.files],
            "sources": str(HOST / SOURCES.relative_to("/")),
            "packages": PACKAGES,
            "code": str(plan.code),
            "assets": str(plan.assets),
            "content": plan.content,
        }
        output: list[bytes] = []

        def show(name: str, data: bytes) -> None:
            output.append(data)
            if name == "stdout":
                note(data.decode(errors="replace").strip().rpartition("\n")[2])

        argv = [PYTHON, "-ISEB", "-c", RECEIVE, str(work["sources"]), json.dumps(work)]
        ended = stream(
            lambda: sockets.connect(places.session), Request(argv, target="vm", user=user, cwd="/", grace=0), stdin=None,
            on_output=show,
        )  # fmt: skip
        if ended.code != 0:
            words = (b"".join(output).decode(errors="replace").strip().splitlines() or [ended.message or ""])[-1]
            raise MachineError(f"fcvm's files could not be copied into the machine: {words}", hint="fcvm machine logs")
        (places.runtime / "synced").write_text(plan.key)
