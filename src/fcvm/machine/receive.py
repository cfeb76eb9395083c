"""In the machine: copies what ``sync.py`` says from the host's files to the machine's own disk.

It is run from the host's copy of the code, which makes it slow to start; it is needed after a change only.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from fcvm.storage.layout import publish

BLOCK = 4 << 20


def main(text: str) -> None:
    """Do the work that the JSON ``text`` describes; says on stdout what it is at."""
    work: dict[str, Any] = json.loads(text)
    for source, target in work["files"]:
        copy_file(Path(source), Path(target))
    code = Path(work["code"])
    code.parent.mkdir(parents=True, exist_ok=True)
    with publish(code) as temporary:
        if not code.exists():
            print("fcvm's code", flush=True)
            for package in work["packages"]:
                ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
                shutil.copytree(Path(work["sources"]) / package, temporary / package, ignore=ignore)
    assets = Path(work["assets"])
    assets.parent.mkdir(parents=True, exist_ok=True)
    with publish(assets) as temporary:
        if not assets.exists():
            temporary.write_text(work["content"])


def copy_file(source: Path, target: Path) -> None:
    """Copy a file that is named by its content, unless it is there."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with publish(target) as temporary:
        if target.exists():
            return
        with open(source, "rb") as reading, open(temporary, "wb") as writing:
            size = os.fstat(reading.fileno()).st_size
            done = 0
            while data := reading.read(BLOCK):
                writing.write(data)
                done += len(data)
                print(f"{target.name} {done >> 20} of {size >> 20} MiB", flush=True)
        os.chmod(temporary, os.stat(source).st_mode & 0o777)
