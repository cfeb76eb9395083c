"""The floor under `fcvm podman run`: the same Firecracker, kernel, guest image and container image, and nothing else.

A shell script in the place of the agent runs the container with crun. What fcvm adds to this is what it costs.
"""

import json
import os
import time
from pathlib import Path

from fcvm import host
from fcvm.firecracker import boot
from fcvm.firecracker.process import CONSOLE, Firecracker
from fcvm.linux import inotify
from fcvm.setup import Assets, cpio
from fcvm.setup.kernel import boot_args
from fcvm.storage import disks
from fcvm.storage.layout import Layout
from fcvm.vm.start import link

SCRIPT = """#!/bin/sh
mount -t devpts devpts /dev/pts
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /run/images /run/bundle/rootfs /scratch/floor/upper /scratch/floor/work
mount -t erofs -o ro /dev/vdc /run/images
lower=$(ls -d /run/images/overlay/*/diff | grep -v /overlay/l/ | tr '\\n' ':')
mount -t overlay -o "lowerdir=${lower%:},upperdir=/scratch/floor/upper,workdir=/scratch/floor/work" overlay /run/bundle/rootfs
cp /run/fcvm/config.json /run/bundle/config.json
crun run --bundle /run/bundle floor >/dev/console 2>&1
reboot -f
"""


def config(args: list[str]) -> bytes:
    """The OCI runtime configuration (its specification, "config.md") of a container that runs ``args`` as root."""
    mounts = [("proc", "/proc", "proc", []), ("tmpfs", "/dev", "tmpfs", ["mode=755"])]
    return json.dumps(
        {
            "ociVersion": "1.0.0",
            "process": {"args": args, "cwd": "/", "env": ["PATH=/usr/bin:/bin"], "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs"},
            "mounts": [{"source": s, "destination": d, "type": t, "options": o} for s, d, t, o in mounts],
            "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")]},
        }
    ).encode()


def initrd(assets: Assets, destination: Path, args: list[str], script: str) -> None:
    """Ours with another end: the kernel unpacks concatenated archives, later files replace earlier ones."""
    init = (Path(host.__file__).parent / "setup/init.sh").read_text()
    head, _, _ = init.rpartition("exec /bin/busybox switch_root")
    head = "".join(line for line in head.splitlines(keepends=True) if "podman" not in line)  # nothing reads it ahead, as nothing runs it
    head += "cp /floor.sh /config.json /root/run/fcvm/ || /bin/busybox cp /floor.sh /config.json /root/run/fcvm/\n"
    init = head + "exec /bin/busybox switch_root -c /dev/console /root /bin/sh /run/fcvm/floor.sh\n"
    entries = [cpio.file("init", init.encode(), 0o755), cpio.file("floor.sh", script.encode(), 0o755)]
    entries.append(cpio.file("config.json", config(args)))
    with open(destination, "wb") as file:
        data = assets.initrd.read_bytes()
        file.write(data + bytes(-len(data) % 512))
        cpio.write(file, entries)


def furnish(assets: Assets, image: Path, directory: Path, args: list[str], script: str = SCRIPT) -> None:
    """Put into ``directory`` what a VM boots from that runs ``script``; /run/bundle/config.json says to run ``args``."""
    link(assets.root_image, directory / boot.ROOT_DISK)
    link(assets.vmlinux, directory / boot.KERNEL)
    link(image, directory / boot.IMAGE_DISK)
    initrd(assets, directory / boot.INITRD, args, script)


def run(assets: Assets, layout: Layout, image: Path, directory: Path, *, cpu: int, memory: int) -> dict[str, float]:
    """Boot once; seconds from the start to the container's first byte on the console, in stages."""
    mark = "floor: first output"
    furnish(assets, image, directory, ["echo", mark])
    started = time.monotonic()
    disks.make_scratch(layout, 1024, directory / boot.SCRATCH_DISK)
    with Firecracker(assets.firecracker, directory, "floor") as vmm, inotify.Watch(directory, inotify.IN_MODIFY) as watch:
        spawned = time.monotonic()
        hardware = boot.Hardware(cpu, memory, boot_args(emulated=host.emulated(), role="vm"), None, None, dirty_tracking=False)
        boot.configure(vmm.api, hardware)
        boot.start(vmm.api)
        while mark.encode() not in (directory / CONSOLE).read_bytes():
            if not watch.wait(timeout=300, unless=vmm.pidfd):
                raise RuntimeError(f"the floor's guest failed.{vmm.console.quote(30)}")
        return {"spawn": spawned - started, "total": time.monotonic() - started}


def fresh(parent: Path, name: str) -> Path:
    """An empty directory."""
    path = parent / f"{name}-{os.getpid()}"
    path.mkdir(parents=True)
    return path
