"""Gives the machine what its VMs need: fcvm's own code, and the kernel, images and Firecracker that setup has made.

All of it is named by content, so it is copied once and never changed. A process in the machine (``receive.py``) takes the
code from its stdin and reads the rest under ``/host``. ``Plan.key`` is noted in the runtime directory when it is done; as
long as it stays the same there is nothing to do.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import fcvm
from fc_agent.structs import Struct, replace
from fcvm.agent.session import Request, stream
from fcvm.errors import MachineError
from fcvm.linux import sockets
from fcvm.machine.state import Places
from fcvm.setup import keys
from fcvm.setup.assets import Assets
from fcvm.storage.layout import locked

PACKAGES = ("fcvm", "fc_agent", "fuse_pipe")
SOURCES = Path(fcvm.__file__).parent.parent

# In the machine.
BASE = Path("/mnt/fcvm-btrfs")
HOST = Path("/host")
PYTHON = "/usr/bin/python3"


class Plan(Struct):
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
        there[name] = BASE / path.relative_to(base) if path.is_relative_to(base) else BASE / "bin" / keys.of_status(path) / path.name
    files = [(getattr(assets, name), path) for name, path in there.items()]
    jailer = assets.firecracker.with_name("jailer")
    if jailer.exists():
        files.append((jailer, there["firecracker"].with_name("jailer")))
    content = replace(assets, **there).to_json()
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    return Plan(tuple(files), BASE / "code" / code_key(), BASE / "cache" / f"assets-{key}.json", content)


def code_alone() -> Plan:
    """For commands that start no VM: fcvm's code, and no assets."""
    return Plan((), BASE / "code" / code_key(), Path(os.devnull), "")


def code_key() -> str:
    """Changes whenever a file of fcvm's packages does: a hash over their names, sizes and times."""
    return hashlib.sha256(json.dumps(code_files()).encode()).hexdigest()[:16]


def code_files() -> list[tuple[str, int, int]]:
    """The files of fcvm's packages below SOURCES: name, size, time of modification in ns."""
    found: list[tuple[str, int, int]] = []
    directories = list(PACKAGES)
    while directories:
        directory = directories.pop()
        with os.scandir(SOURCES / directory) as entries:
            for entry in entries:
                name = f"{directory}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    directories += [name] if entry.name != "__pycache__" else []
                elif not entry.name.startswith("."):
                    status = entry.stat()
                    found.append((name, status.st_size, status.st_mtime_ns))
    return sorted(found)


def pack_code() -> bytes:
    """The code as ``receive.py`` reads it."""
    files = [(name, (SOURCES / name).read_bytes(), modified) for name, _, modified in code_files()]
    index = json.dumps([(name, len(data), modified) for name, data, modified in files])
    return b"".join([index.encode(), b"\n", *(data for _, data, _ in files)])


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
            "code": str(plan.code),
            "assets": str(plan.assets),
            "content": plan.content,
        }
        output: list[bytes] = []

        def show(name: str, data: bytes) -> None:
            output.append(data)
            if name == "stdout":
                note(data.decode(errors="replace").strip().rpartition("\n")[2])

        program = Path(__file__).with_name("receive.py").read_text()
        request = Request(
            [PYTHON, "-ISE", "-c", program, json.dumps(work)], target="vm", user=user, cwd="/", stdin=True, grace=0
        )
        with open(os.memfd_create("code"), "w+b") as code:
            code.write(pack_code())
            code.seek(0)
            ended = stream(lambda: sockets.connect(places.session), request, stdin=code.fileno(), on_output=show)
        if ended.code != 0:
            words = (b"".join(output).decode(errors="replace").strip().splitlines() or [ended.message or ""])[-1]
            raise MachineError(f"fcvm's files could not be copied into the machine: {words}", hint="fcvm machine logs")
        (places.runtime / "synced").write_text(plan.key)
