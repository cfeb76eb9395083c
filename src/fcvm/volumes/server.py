"""The process that serves one VM's volumes: ``python -m fcvm.volumes.server``, started by ``service.Volumes``.

Its stdin is a socket to its owner. The first line is the job, answered by an empty line when all is served; then every
line ``{"op": "save"}`` is answered by one line with the state of all volumes. The end of that connection is the end of
this process. What the guest's mounts know is in journals, so whoever kills this process and starts another one costs the
guest a pause only.

    {"volumes": [{"root": PATH, "read_only": BOOL, "owner": [UID, GID], "listener": FD, "journals": PATH}, ...],
     "states": PATH of a snapshot's volumes.json, or null}
"""

import json
import logging
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from fuse_pipe.errors import FusePipeError
from fuse_pipe.server import Server

log = logging.getLogger("fuse_pipe")


def main() -> None:
    """Serve until the owner hangs up. Never returns."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    with socket.socket(fileno=os.dup(0)) as owner, owner.makefile("rwb") as lines:
        job = json.loads(lines.readline())
        states = _states(job["states"], len(job["volumes"]))
        servers = [start(volume, state) for volume, state in zip(job["volumes"], states, strict=True)]
        lines.write(b"\n")
        lines.flush()
        for line in lines:
            assert json.loads(line) == {"op": "save"}
            lines.write(json.dumps([server.save() for server in servers]).encode() + b"\n")
            lines.flush()
    os._exit(0)


def start(volume: dict[str, Any], state: dict[str, Any] | None) -> Server:
    """Serve one volume in threads."""
    options = {
        "read_only": volume["read_only"],
        "owner": tuple(volume["owner"]),
        "journals": volume["journals"],
    }
    try:
        server = Server(volume["root"], state=state, **options)
    except FusePipeError as error:  # of another version: open files are lost, names are looked up anew
        log.warning("%s: %s", volume["root"], error)
        server = Server(volume["root"], **options)
    listener = socket.socket(fileno=volume["listener"])
    threading.Thread(target=server.accept, args=(listener,), name="volume", daemon=True).start()
    return server


def _states(path: str | None, count: int) -> list[dict[str, Any] | None]:
    """What a snapshot has kept of each volume."""
    if path is None:
        return [None] * count
    saved: list[dict[str, Any]] = json.loads(Path(path).read_text())
    if len(saved) != count:
        log.warning("%s is of %d volumes, not %d", path, len(saved), count)
        return [None] * count
    return list(saved)


if __name__ == "__main__":
    try:
        main()
    except ConnectionResetError:  # the owner was killed
        sys.exit(1)
