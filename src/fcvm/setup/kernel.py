"""The guest kernel: which one a setting names, and the command line that it boots with.

Profile ``debian`` is the cloud kernel that comes along with the guest image (guest.py). Profile ``kata`` is the kernel
of a Kata Containers static release: an archive whose ``opt/kata/share/kata-containers/vmlinux.container`` (or the newest
``vmlinux-VERSION``) is an ELF kernel with everything built in:

    kernels/<key>.json               Kata, as JSON; <key> is that of the archive's URL and checksum
    kernels/<id>/vmlinux
"""

import json
import os
import posixpath
import re
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from fcvm import host
from fcvm.config import Config
from fcvm.errors import SetupError, UsageError
from fcvm.process import failure, spawn
from fcvm.setup import download, keys, workspace
from fcvm.setup.progress import Progress, Step
from fcvm.storage.layout import Layout

# console: kernel and agent messages go to the VM's console log. reboot=k, panic=-1: a guest that reboots or panics ends
# its VMM at once. i8042: Firecracker's has nothing but the reset line. mitigations=off: a guest holds one container, and
# the VM is the boundary. The rest saves boot time. Firecracker has no PCI; the machine (QEMU) has.
COMMON = ("console=ttyS0", "panic=-1", "quiet", "mitigations=off", "cryptomgr.notests", "rcupdate.rcu_expedited=1")
X86 = ("reboot=k", "random.trust_cpu=on", "i8042.noaux", "i8042.nomux", "i8042.dumbkbd")
ARM = ("reboot=k", "keep_bootcon")
VM = ("pci=off",)

# Under emulation with a busy host CPU the kernel's calibration of the TSC against the PIT fails, and it hangs. QEMU's
# emulated TSC is the host's, so its frequency can be told.
EMULATED = ("tsc=reliable", "no_timer_check")

KATA_VERSION = "3.32.0"
KATA_URL = "https://github.com/kata-containers/kata-containers/releases/download/{version}/kata-static-{version}-{arch}.tar.zst"
KATA_SHA256 = {"amd64": "1449ecea50bd91fa73a94648db195d18950fe869ba4b1f12d05f55f1fa7c1b01"}
KATA_DIRECTORY = "opt/kata/share/kata-containers"
KATA_SPACE = 2 << 30

PROFILES = ("debian", "kata")


def boot_args(*, emulated: bool, role: str) -> str:
    """The kernel command line.

    Arguments:
        emulated: the CPU that will run it is emulated by software, however many levels below.
        role: ``"vm"`` or ``"machine"``.
    """
    words = [*COMMON, *(X86 if os.uname().machine == "x86_64" else ARM), *(VM if role == "vm" else ())]
    if emulated and os.uname().machine == "x86_64":
        words += [f"tsc_early_khz={host.tsc_khz()}", *EMULATED]
    return " ".join([*words, f"fcvm.role={role}"])


@dataclass(frozen=True, slots=True)
class Kata:
    """A kernel out of a Kata release: ``id`` under ``kernels/``."""

    id: str
    version: str


def archive(config: Config, arch: str) -> tuple[str, str]:
    """URL and SHA-256 of the release archive to use.

    Raises:
        UsageError: there is a URL without a checksum, or none is known for this architecture.
    """
    url, sha256 = config.kernel_url, config.kernel_sha256
    if not url:
        url = KATA_URL.format(version=KATA_VERSION, arch=arch)
        sha256 = sha256 or KATA_SHA256.get(arch, "")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UsageError(
            f"The kernel archive {url} needs a SHA-256 checksum of 64 hexadecimal digits.",
            hint="set kernel_sha256 beside kernel_url, or FCVM_KERNEL_SHA256",
        )
    return url, sha256.lower()


def lookup(config: Config, base: Path, arch: str) -> Kata | None:
    """The kata kernel fetched earlier; None if it is not there."""
    try:
        kernel = Kata(**json.loads((base / "kernels" / f"{keys.of(archive(config, arch))}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return kernel if (base / "kernels" / kernel.id / "vmlinux").exists() else None


def build(config: Config, layout: Layout, progress: Progress, arch: str) -> Kata:
    """The kata kernel for these settings, fetched unless it is there.

    Raises:
        SetupError: the archive cannot be fetched, is not the one expected, or holds no kernel.
    """
    url, sha256 = archive(config, arch)
    key = keys.of((url, sha256))
    with progress.step("Kata kernel") as step, workspace.building(layout, f"kernel-{key}", step) as work:
        kernel = lookup(config, layout.base, arch)
        if kernel is None:
            workspace.require_space(layout.base, KATA_SPACE)
            file = work / url.rpartition("/")[2]
            by_hand = f"fetch {url} where you can, then FCVM_KERNEL_URL=file:///PATH FCVM_KERNEL_SHA256={sha256} fcvm setup"
            download.fetch(url, file, step=step, sha256=sha256, by_hand=by_hand)
            kernel = publish(file, work, layout, step)
            pointer = work / "pointer.json"
            pointer.write_text(json.dumps(asdict(kernel), indent=2) + "\n")
            workspace.replace(pointer, layout.kernels / f"{key}.json")
    return kernel


def publish(file: Path, work: Path, layout: Layout, step: Step) -> Kata:
    """Take the kernel out of the archive ``file`` and put it under ``kernels/``."""
    step.note("unpacking")
    directory = work / "kernel"
    directory.mkdir()
    version = unpack(file, directory / "vmlinux")
    kernel = Kata(keys.of_file(directory / "vmlinux"), version)
    workspace.publish(directory, layout.kernels / kernel.id)
    return kernel


def unpack(file: Path, destination: Path) -> str:
    """Write the kernel in a Kata release archive to ``destination`` and return its version.

    Raises:
        SetupError: the archive is damaged or holds no kernel.
    """
    found: dict[str, bytes] = {}
    chosen = ""
    try:
        with decompressed(file) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                directory, name = posixpath.split(posixpath.normpath(member.name))
                if directory != KATA_DIRECTORY:
                    continue
                if name == "vmlinux.container" and member.issym():
                    chosen = posixpath.basename(member.linkname)
                elif re.fullmatch(r"vmlinux-[0-9][0-9.]*(-[0-9]+)?", name) and member.isfile():
                    content = tar.extractfile(member)
                    assert content is not None
                    found[name] = content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise SetupError(f"The kernel archive {file.name} is damaged: {error}.") from error
    if chosen not in found:
        chosen = max(found, key=version_numbers, default="")
    if not chosen:
        raise SetupError(f"The kernel archive {file.name} holds no {KATA_DIRECTORY}/vmlinux-VERSION.")
    destination.write_bytes(found[chosen])
    return chosen.removeprefix("vmlinux-")


def version_numbers(name: str) -> list[int]:
    """What to sort kernel names by: ``vmlinux-6.18.5-177`` is newer than ``vmlinux-6.9.1-200``."""
    return [int(word) for word in re.findall(r"[0-9]+", name)]


@contextmanager
def decompressed(file: Path) -> Iterator[IO[bytes]]:
    """The content of ``file`` as a stream, decompressed by what its name ends in (.zst, .xz, .gz, .tgz)."""
    if file.suffix != ".zst":
        import gzip
        import lzma

        opener = {".xz": lzma.open, ".gz": gzip.open, ".tgz": gzip.open}.get(file.suffix, open)
        with opener(file, "rb") as stream:
            yield stream
        return
    command = ["zstd", "-dcq", str(file)]
    process = spawn(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr:
        try:
            yield process.stdout
        except tarfile.TarError as error:
            process.wait()  # what zstd says is the cause
            raise SetupError(str(failure(command, process.returncode, process.stderr.read()))) from error
        finally:
            process.kill()
            process.wait()
