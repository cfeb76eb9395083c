"""Packs the guest agent into one file that Python runs: ``fc_agent.pyz``, the packages fc_agent and fuse_pipe.

The same sources give the same bytes, wherever and whenever it is done.
"""

import zipfile
from pathlib import Path

PACKAGES = ("fc_agent", "fuse_pipe")
SOURCES = Path(__file__).parent.parent.parent

START = b"from fc_agent.__main__ import main\n\nmain()\n"


def pack(destination: Path) -> None:
    """Write the archive to ``destination``; `python3 -ISE destination` is the agent.

    Stored, not compressed: it is unpacked in every VM's boot, and the disk image around it is small anyway.
    """
    with zipfile.ZipFile(destination, "w", zipfile.ZIP_STORED) as archive:
        for name, content in _contents():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, on whatever system this runs
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)


def _contents() -> list[tuple[str, bytes]]:
    files = [path for package in PACKAGES for path in sorted((SOURCES / package).rglob("*.py"))]
    return [("__main__.py", START), *((str(path.relative_to(SOURCES)), path.read_bytes()) for path in files)]
