"""What runs as PID 1 in the guest of bench/volumes_qemu.py: mounts what there is, measures in turn, says what came of it.

It lies in one archive with ``files``, ``fuse_pipe`` and ``job.json``. The answer, one line of JSON, goes to the second serial
port.
"""

import ctypes
import json
import os
import platform
import socket
import sys
import termios
import traceback
import zipfile
from pathlib import Path
from typing import Any

import files

from fuse_pipe import linux
from fuse_pipe.relay import mount_and_relay

ANSWER = "/dev/ttyS1"
RB_AUTOBOOT = 0x01234567


def mount_map(point: Path, port: int) -> None:
    """The relay is another process, as in a VM. Here it is the host that makes the connections."""
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((socket.VMADDR_CID_ANY, port))
    listener.listen()
    mounted, tell = os.pipe()
    if os.fork() == 0:
        try:
            mount_and_relay(lambda: listener.accept()[0], str(point), ready=lambda: os.close(tell))
        finally:
            os._exit(1)
    os.close(tell)
    os.read(mounted, 1)  # until it is closed
    if not point.is_mount():
        raise OSError("the relay ended")


def mount(name: str, point: Path, port: int) -> None:
    if name == "map":
        mount_map(point, port)
    elif name == "9p":
        linux.mount(name, str(point), "9p", 0, "trans=virtio,version=9p2000.L,msize=1048576")
    elif name == "tmpfs":
        linux.mount(name, str(point), "tmpfs", 0, "")
    else:
        linux.mount(name, str(point), "virtiofs", 0, "")


def measure() -> dict[str, Any]:
    with zipfile.ZipFile(sys.argv[0]) as archive:
        job = json.loads(archive.read("job.json"))
    Path("/dev/shm").mkdir()
    linux.mount("shm", "/dev/shm", "tmpfs", 0, "")  # for multiprocessing
    found: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for name in job["targets"]:
        point = Path("/run", name)
        point.mkdir()
        try:
            mount(name, point, job["port"])
            found[name] = point
        except OSError as error:
            missing[name] = str(error)
    results = files.measure(files.CASES, found, files.SIZES[job["sizes"]], job["rounds"])
    return {"results": results, "missing": missing, "kernel": platform.release()}


def main() -> None:
    answer: dict[str, Any]
    try:
        answer = measure()
    except BaseException:
        answer = {"error": traceback.format_exc()}
    with open(ANSWER, "w") as port:
        port.write(json.dumps(answer) + "\n")
        port.flush()
        termios.tcdrain(port.fileno())
    ctypes.CDLL(None).reboot(RB_AUTOBOOT)  # which ends this QEMU


if __name__ == "__main__":
    main()
