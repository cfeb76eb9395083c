"""What a mapped directory costs beside QEMU's own ways, in one guest and in turn: fuse_pipe, virtiofsd and 9p.

    python -m bench.volumes_qemu [--quick] [--json FILE] [--dir DIR] [--virtiofsd PROGRAM] [--kernel DIR]

Starts a QEMU of its own (with KVM where there is one, else emulated) with fcvm's kernel and root file system and runs the
cases of bench/files.py in it. ``map`` is fuse_pipe over vsock; ``hostfs`` the same server behind a virtio-fs device, as
which the machine has the host's files; ``tmpfs`` the guest's own memory. What is not there is left out, and it is said:
virtiofsd is in Debian's package of that name, and 9p needs a kernel that has it, which fcvm's, Debian's for clouds, has not.
``--kernel`` takes an unpacked package of another one::

    apt-get download linux-image-VERSION; dpkg -x linux-image-*.deb DIR; busybox depmod -b DIR/usr VERSION

Needs root, x86-64, and what ``fcvm setup`` provides.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from bench import files
from fcvm import config, host, process, setup
from fcvm.agent import pack
from fcvm.linux import sockets
from fcvm.machine import hostfs, qemu
from fcvm.machine.vsock import Vsock
from fcvm.setup import index, initrd, kernel, modules
from fcvm.setup.assets import Assets
from fcvm.storage.layout import Layout
from fuse_pipe.server import Server

PORT = 5000  # of vsock
MEMORY = 1024  # MiB
CONNECTIONS = 2  # of a relay with one channel
LIMIT = 3600.0  # seconds; an emulated guest takes minutes
WITH_9P = ("9p", "9pnet_virtio")
EARLIER = ("crc32c_generic",)  # which erofs asks for by name: no dependency in modules.dep


def serve_map(directory: Path, path: Path) -> None:
    """The server of ``map``, in a process of its own, for as long as the one that started it lives."""
    starter = os.getppid()
    server = Server(str(directory))

    def connect() -> None:
        while os.getppid() == starter:  # again and again, until somebody listens in the guest
            with suppress(OSError):
                sock = socket.socket(socket.AF_UNIX)
                sock.connect(str(path))
                server.connection(sock)
            time.sleep(0.1)

    for _ in range(CONNECTIONS - 1):
        threading.Thread(target=connect, daemon=True).start()
    connect()


def find_kernel(assets: Assets, unpacked: Path | None) -> tuple[Path, Path]:
    """The kernel to boot, and its modules' directory. Raises SystemExit: ``unpacked`` is not what ``--kernel`` takes."""
    if unpacked is None:
        return assets.vmlinuz, assets.vmlinuz.parent / "modules" / assets.kernel_version
    found = sorted(unpacked.glob("boot/vmlinuz-*"))
    for image in found:
        for directory in unpacked.glob(f"**/lib/modules/{image.name.removeprefix('vmlinuz-')}/modules.dep"):
            return image, directory.parent
    raise SystemExit(f"{unpacked} has no boot/vmlinuz-VERSION with lib/modules/VERSION/modules.dep; see --help")


def pack_guest(path: Path, job: dict[str, Any]) -> None:
    """Write what PID 1 of the guest is."""
    here = Path(__file__).parent
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(here / "volumes_qemu_inside.py", "__main__.py")
        archive.write(here / "files.py", "files.py")
        for source in (pack.SOURCES / "fuse_pipe").glob("*.py"):
            archive.write(source, f"fuse_pipe/{source.name}")
        archive.writestr("job.json", json.dumps(job))


def command(base: Path, image: Path, root: Path, fds: dict[str, int], targets: dict[str, Path]) -> list[str]:
    """QEMU's command line. ``fds``: sockets of the devices that this process serves."""
    kvm = host.kvm().usable
    words = [
        qemu.find()[0], "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-machine", "q35,memory-backend=memory,usb=off,vmport=off",
        "-accel", "kvm" if kvm else f"tcg,thread=multi,tb-size={qemu.translated(MEMORY)}", "-cpu", "host" if kvm else "max",
        "-smp", "2", "-m", f"{MEMORY}M", "-object", f"memory-backend-memfd,id=memory,size={MEMORY}M,share=on",
        "-kernel", str(image), "-initrd", str(base / "initrd.img"),
        "-append", kernel.boot_args(emulated=not kvm, role="machine"),
        "-chardev", f"file,id=console,path={base}/console,append=on", "-serial", "chardev:console",
        "-chardev", f"file,id=answer,path={base}/answer", "-serial", "chardev:answer",
        "-drive", f"file={root},if=virtio,format=raw,readonly=on",
        "-chardev", f"socket,id=vsock,fd={fds['vsock']}", "-device", "vhost-user-vsock-pci,chardev=vsock",
        "-chardev", f"socket,id=hostfs,fd={fds['hostfs']}",
        "-device", "vhost-user-fs-pci,chardev=hostfs,tag=hostfs,queue-size=1024",
    ]  # fmt: skip
    if "virtiofsd" in targets:
        words += ["-chardev", f"socket,id=virtiofsd,path={base}/virtiofsd.sock"]
        words += ["-device", "vhost-user-fs-pci,chardev=virtiofsd,tag=virtiofsd,queue-size=1024"]
    if "9p" in targets:
        words += ["-fsdev", f"local,id=files,path={targets['9p']},security_model=passthrough"]
        words += ["-device", "virtio-9p-pci,fsdev=files,mount_tag=9p"]
    return words


def ended(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    child.wait()


def measure(base: Path, assets: Assets, args: argparse.Namespace) -> dict[str, Any]:
    """Start everything, wait for the guest's answer, end everything."""
    image, directory = find_kernel(assets, args.kernel)
    missing: dict[str, str] = {}
    names = ["9p", "hostfs", "map", "tmpfs", "virtiofsd"]
    virtiofsd = args.virtiofsd or shutil.which("virtiofsd", path=f"{os.environ['PATH']}:/usr/libexec")
    if not virtiofsd:
        missing["virtiofsd"] = "it is not installed (Debian: apt-get install virtiofsd)"
    known = modules.read(directory)
    wanted = [*(name for name in EARLIER if name in known.paths), *index.INITRD_MODULES]
    if set(WITH_9P) <= known.paths.keys() | known.builtin:
        wanted += WITH_9P
    else:
        missing["9p"] = "the kernel does not have it; see --kernel"
    targets = {name: base / name for name in names if name not in missing}
    for path in targets.values():
        path.mkdir()
    rounds = args.rounds or (1 if args.quick else 3)
    job = {
        "targets": list(targets), "port": PORT, "rounds": rounds,
        "sizes": "emulated" if not host.kvm().usable else "quick" if args.quick else "full",
    }  # fmt: skip
    pack_guest(base / "guest.pyz", job)
    initrd.build(
        base / "initrd.img", busybox=assets.tools / "busybox", agent=base / "guest.pyz", module_directory=directory, wanted=wanted
    )  # fmt: skip
    with ExitStack() as stack:
        server = multiprocessing.get_context("fork").Process(target=serve_map, args=(targets["map"], base / "vsock.sock"), daemon=True)
        server.start()
        stack.callback(server.join)
        stack.callback(server.kill)
        if virtiofsd and "virtiofsd" in targets:
            with sockets.listen(base / "virtiofsd.sock") as listener:
                words = [virtiofsd, "--fd", str(listener.fileno()), "--shared-dir", str(targets["virtiofsd"]), "--log-level", "error"]
                stack.callback(ended, process.spawn(words, pass_fds=[listener.fileno()], stderr=None))
        pairs = {name: socket.socketpair() for name in ("vsock", "hostfs")}
        fds = {name: theirs.fileno() for name, (_, theirs) in pairs.items()}
        words = command(base, image, assets.root_image, fds, targets)
        child = process.spawn(words, pass_fds=list(fds.values()), stderr=stack.enter_context((base / "console").open("ab")))
        stack.callback(ended, child)
        for _, theirs in pairs.values():
            theirs.close()
        vsock = Vsock(pairs["vsock"][0], sockets.listen(base / "vsock.sock"), PORT)
        for serve in (vsock.serve, lambda: hostfs.serve_host(pairs["hostfs"][0], str(targets["hostfs"]))):
            threading.Thread(target=serve, daemon=True).start()
        with suppress(subprocess.TimeoutExpired):
            child.wait(LIMIT)
    text = (base / "answer").read_text() if (base / "answer").exists() else ""
    if not text:
        console = (base / "console").read_text(errors="replace").splitlines()[-20:]
        raise SystemExit("\n".join(["The guest gave no answer. The last that it and QEMU said:", *console]))
    answer: dict[str, Any] = json.loads(text)
    if "error" in answer:
        raise SystemExit(f"The guest failed:\n{answer['error']}")
    answer["missing"].update(missing)
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small files and one round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rates and ratios here")
    parser.add_argument("--dir", help="where to work (default: the temporary directory)")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--kernel", type=Path, metavar="DIR", help="an unpacked kernel package instead of fcvm's")
    parser.add_argument("--virtiofsd", metavar="PROGRAM")
    args = parser.parse_args()
    if os.geteuid() != 0 or os.uname().machine != "x86_64":
        print("This needs root, and x86-64.\nhint: sudo python -m bench.volumes_qemu", file=sys.stderr)
        return 125
    settings = config.load()
    assets = setup.find(settings, Layout(settings.base_dir))
    with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
        answer = measure(Path(temporary), assets, args)
    for name, reason in answer["missing"].items():
        print(f"Without {name}: {reason}", file=sys.stderr)
    print(f"Linux {answer['kernel']} in QEMU{'' if host.kvm().usable else ', emulated'}")
    files.show(files.CASES, answer["results"], "map")
    if args.json:
        args.json.write_text(json.dumps(files.report(files.CASES, answer["results"], "map"), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
