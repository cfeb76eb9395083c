"""Packs the guest agent into one file that Python runs: ``fc_agent.pyz``, the packages fc_agent and fuse_pipe.

The same sources give the same bytes, wherever and whenever it is done.
"""

import hashlib
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from fcvm import process

PACKAGES = ("fc_agent", "fuse_pipe")
SOURCES = Path(__file__).parent.parent.parent

START = b"from fc_agent.__main__ import main\n\nmain()\n"

# Compiled with the guest's Python (bytecode differs from release to release). No time stamps, nothing to check against.
COMPILE = """
import sys, pathlib, py_compile
for source in sorted(pathlib.Path(sys.argv[1]).rglob("*.py")):
    name = str(source.relative_to(sys.argv[1]))
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(source), str(source) + "c", name, doraise=True, invalidation_mode=mode)
"""


def pack(destination: Path, *, python: Sequence[str] | None = None) -> None:
    """Write the archive to ``destination``; `python3 -ISE destination` is the agent.

    Stored, not compressed: it is unpacked in every VM's boot, and the disk image around it is small anyway.

    Arguments:
        python: a command that runs the guest's own release of Python; the archive then holds bytecode as well, and the
            agent starts without compiling itself (seconds, under emulation).
    """
    contents = _contents()
    if python is not None:
        contents = _compiled(contents, python)
    with zipfile.ZipFile(destination, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents:
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, on whatever system this runs
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)


def digest() -> str:
    """What identifies the agent: a SHA-256 over everything that is packed, in hexadecimal."""
    state = hashlib.sha256()
    for name, content in _contents():
        state.update(f"{name}\0{len(content)}\0".encode())
        state.update(content)
    return state.hexdigest()


def _contents() -> list[tuple[str, bytes]]:
    files = [path for package in PACKAGES for path in sorted((SOURCES / package).rglob("*.py"))]
    return [("__main__.py", START), *((str(path.relative_to(SOURCES)), path.read_bytes()) for path in files)]


def _compiled(contents: list[tuple[str, bytes]], python: Sequence[str]) -> list[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for path, content in contents:
            (directory / path).parent.mkdir(exist_ok=True)
            (directory / path).write_bytes(content)
        process.run([*python, "-ISEc", COMPILE, name])
        # Only bytecode: tracebacks then have file names and lines, and no text of them.
        return [(f"{path}c", (directory / f"{path}c").read_bytes()) for path, _ in contents]
