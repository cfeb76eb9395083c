"""What `fcvm doctor` looks at. Every check looks at one thing, changes nothing, and knows the command that mends it."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fc_agent.structs import Struct
from fcvm import host, process
from fcvm.config import Config
from fcvm.errors import FcvmError
from fcvm.linux import namespaces
from fcvm.network import diagnose
from fcvm.setup import assets, storage
from fcvm.setup.progress import size
from fcvm.storage.layout import Layout

QEMU_HINT = "sudo make packages, which takes it from Debian's backports (or: apt-get install -t bookworm-backports qemu-system-x86)"

# Program -> (package, what it is for). What only some hosts need is checked apart; the VM itself takes no more than mkfs.ext4.
PROGRAMS = {
    "mmdebstrap": ("mmdebstrap", "fcvm setup builds the guest image with it"),
    "zstd": ("zstd", "fcvm setup unpacks kernels with it"),
    "mkfs.ext4": ("e2fsprogs", "it formats the disks of VMs"),
    "skopeo": ("skopeo", "it fetches container images"),
}

# What Linux gives every user at least. Each volume takes one of the first, each directory of one that a guest looks into one of the second.
WATCHES = {"max_user_instances": 128, "max_user_watches": 8192}

SPACE_WARN = 10 << 30
SPACE_FAIL = 1 << 30

Status = Literal["ok", "warn", "fail"]


class Check(Struct):
    """One finding: ``fail`` means that `fcvm podman run` cannot work, ``warn`` that something is slower or missing."""

    name: str
    status: Status
    detail: str
    hint: str | None = None


def every(config: Config, layout: Layout) -> Iterator[Check]:
    """All checks that matter on this host, in the order in which problems are best mended."""
    machine = host.uses_machine(config)
    yield kvm(config, machine)
    if machine:
        yield qemu()
        yield memory(config)
    else:
        yield from networks("bridged" if os.geteuid() == 0 else "rootless")
        yield watches()
    yield nesting(machine)
    ready = prepared(config, layout)
    yield from programs(ready.status == "ok")
    if os.geteuid() != 0:
        if machine:
            yield user_namespaces()
        yield subordinate_ids()
    yield reflinks(config, layout)
    yield space(layout)
    yield ready


def kvm(config: Config, machine: bool) -> Check:
    state = host.kvm()
    if state.usable:
        return Check("KVM", "ok", state.reason + (" The setting machine=always leaves it unused." if machine else ""))
    if machine:
        return Check(
            "KVM",
            "warn",
            f"{state.reason} VMs run in an emulated host, the machine: slower, otherwise the same.",
            state.hint,
        )
    never = " The setting machine=never forbids the machine." if config.machine == "never" else ""
    return Check("KVM", "fail", state.reason + never, state.hint)


def qemu() -> Check:
    """Whether the machine can be run."""
    from fcvm.machine import qemu

    try:
        program, version = qemu.find()
    except FcvmError as error:
        return Check("QEMU", "fail", f"{error.message} The machine is run by it.", QEMU_HINT)
    return Check("QEMU", "ok", f"QEMU {version}, {program}.")


def memory(config: Config) -> Check:
    match = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    available = int(match[1]) // 1024 if match else 0
    if available < config.machine_mem:
        return Check(
            "Memory",
            "warn",
            f"{available} MiB are free, less than the machine may take ({config.machine_mem} MiB).",
            f"FCVM_MACHINE_MEM={max(available * 3 // 4, 1024)}m, or machine_mem in the configuration file",
        )
    return Check("Memory", "ok", f"{available} MiB are free; the machine takes up to {config.machine_mem} MiB.")


def networks(mode: str) -> Iterator[Check]:
    """What stands in the way of the networks of this user's VMs, or one line that says that nothing does."""
    problems = diagnose.problems(mode)
    for error in problems:
        yield Check("Networks", "fail", error.message, error.hint)
    if not problems:
        yield Check("Networks", "ok", f"VMs can have networks ({mode}).")


def watches(settings: Path = Path("/proc/sys/fs/inotify")) -> Check:
    """Whether this user may watch what volumes show: what is not watched, a guest sees a second late."""
    limits = {name: int((settings / name).read_text()) for name in WATCHES}
    shown = ", ".join(f"fs.inotify.{name} = {value}" for name, value in limits.items())
    raised = " ".join(f"fs.inotify.{name}={WATCHES[name]}" for name, value in limits.items() if value < WATCHES[name])
    if raised:
        detail = f"{shown}: beyond it, guests see what the host changes a second late."
        return Check("Volumes", "warn", detail, f"sudo sysctl -w {raised}")
    return Check("Volumes", "ok", f"{shown}.")


def nesting(machine: bool) -> Check:
    """Whether guests can use KVM themselves."""
    if machine:
        return Check("Nesting", "ok", "The machine's KVM nests: VMs can run VMs, at a fraction of the speed.")
    state = host.nesting()
    return Check("Nesting", "ok" if state.usable else "warn", state.reason, state.hint)


def programs(ready: bool) -> Iterator[Check]:
    """The programs that are missing, or one line that says that none is; where all is set up (``ready``) a VM needs few of them."""
    needed = dict(PROGRAMS)
    if os.environ.get(assets.OVERRIDE):  # all that setup provides has come from elsewhere
        del needed["mmdebstrap"], needed["zstd"]
    missing = {name: needed[name] for name in needed if not installed(name)}
    for name, (package, why) in missing.items():
        status: Status = "warn" if ready and name != "mkfs.ext4" else "fail"
        yield Check("Programs", status, f"{name} is not installed; {why}.", f"sudo apt-get install {package}")
    if not missing:
        yield Check("Programs", "ok", f"{', '.join(needed)} are installed.")


def installed(program: str) -> bool:
    return shutil.which(program, path=process.environment()["PATH"]) is not None


def user_namespaces() -> Check:
    """Whether this user may make user namespaces, which building the guest image without root takes."""
    try:
        namespaces.create(list, user=True)[0].close()
    except FcvmError as error:
        return Check("User namespaces", "warn", error.message, error.hint)
    return Check("User namespaces", "ok", "You may make user namespaces.")


def subordinate_ids() -> Check:
    """Whether this user has subordinate ids, which building the guest image without root takes."""
    name = host.user_name()
    if not installed("newuidmap"):
        return Check("Subordinate ids", "warn", "newuidmap is not installed.", "sudo apt-get install uidmap")
    for path in (Path("/etc/subuid"), Path("/etc/subgid")):
        if not has_range(path, name, str(os.getuid())):
            return Check(
                "Subordinate ids",
                "warn",
                f"{name} has none in {path}: fcvm setup cannot build the guest image without root.",
                f"sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}",
            )
    return Check("Subordinate ids", "ok", f"{name} has subordinate ids.")


def has_range(path: Path, name: str, uid: str) -> bool:
    """Whether a file like /etc/subuid (``name:first:count``) gives this user at least 65536 ids at once."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return False
    fields = [line.split(":") for line in lines]
    return any(len(f) == 3 and f[0] in (name, uid) and f[2].isdigit() and int(f[2]) >= 65536 for f in fields)


def reflinks(config: Config, layout: Layout) -> Check:
    base = layout.base
    if not os.path.isdir(base):  # or we may not even look
        return Check("Storage", "fail", f"The data directory {base} does not exist.", "fcvm setup --storage-only")
    if not os.access(base, os.W_OK):
        return Check(
            "Storage", "fail", f"You may not write to {base}.", "FCVM_BASE_DIR=DIRECTORY chooses another place"
        )
    found = storage.examine(base)
    if found.kind != "copies":
        return Check("Storage", "ok", f"{base}: {found.detail}.")
    if storage.image_of(base).exists():
        return Check(
            "Storage", "fail", f"{storage.image_of(base)} is not mounted on {base}.", "sudo fcvm setup --storage-only"
        )
    hint = (
        f"move {base} away, then: sudo fcvm setup --storage-only"
        if os.geteuid() == 0
        else "put FCVM_BASE_DIR on btrfs or xfs"
    )
    return Check("Storage", "warn", f"{base}: {found.detail}.", hint)


def space(layout: Layout) -> Check:
    existing = next(path for path in (layout.base, *layout.base.parents) if os.path.exists(path))
    free = storage.free(layout.base) if existing == layout.base else shutil.disk_usage(existing).free
    status: Status = "fail" if free < SPACE_FAIL else "warn" if free < SPACE_WARN else "ok"
    hint = None if status == "ok" else f"fcvm images prune; df -h {existing}"
    return Check("Free space", status, f"{size(free)} in {existing}.", hint)


def prepared(config: Config, layout: Layout) -> Check:
    try:
        found = assets.find(config, layout)
    except FcvmError as error:
        return Check("Setup", "fail", error.message, error.hint)
    return Check("Setup", "ok", f"Linux {found.kernel_version}, Firecracker {found.firecracker_version}.")
