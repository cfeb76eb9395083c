"""Makes this guest a place where VMs run: KVM, and fcvm with all that it needs, from the disk that the host has put together.

See ``fcvm/nested/disk.py`` for what is on it.
"""

import os
import subprocess
from contextlib import suppress

from fc_agent import linux

DISK = "/dev/vdd"
PLACE = "/opt/fcvm"
BASE = "/scratch/fcvm"  # the data directory: on the scratch disk itself, as the overlay above it would only cost
COMMAND = "/usr/local/bin/fcvm"
SHARED = ("kernels", "guest", "initrd", "bin", "nested")
DEVICES = ("/dev/kvm", "/dev/net/tun", "/dev/fuse", "/dev/userfaultfd")

# enable_virt_at_load: KVM takes the CPU's extension into use with the first VM and leaves it with the last (Linux 6.12), so
# that a snapshot of this guest, in which Firecracker does not save that state, is good as long as no VM runs in it.
# min_timer_period_us: under emulation a VM in this one that runs VMs too is not to be interrupted more often; see
# fcvm/setup/kernel.py, COARSE.
TIMER_PERIOD = 20000
OPTIONS = "options kvm enable_virt_at_load=0\n"
EMULATED_OPTIONS = f"options kvm min_timer_period_us={TIMER_PERIOD}\n"


def prepare() -> None:
    """Mount the disk, load KVM, put the command on the PATH.

    Raises:
        OSError: the disk or KVM cannot be had; the message is for the user.
    """
    if os.path.ismount(PLACE):
        return
    loading = _load_modules()
    os.makedirs(PLACE, exist_ok=True)
    linux.mount(DISK, PLACE, "erofs", linux.MS_RDONLY | linux.MS_NODEV)
    os.makedirs(BASE, exist_ok=True)
    for name in SHARED:
        with suppress(FileExistsError):
            os.symlink(f"{PLACE}/{name}", f"{BASE}/{name}")
    with suppress(FileExistsError):
        os.symlink(f"{PLACE}/fcvm", COMMAND)
    words = loading.communicate()[1].decode(errors="replace").strip()
    if not os.path.exists("/dev/kvm"):
        raise OSError(f"the kernel gives no /dev/kvm, so no VMs can run in this one: {words or 'its KVM is not built in'}")
    for path in DEVICES:
        with suppress(FileNotFoundError):
            os.chmod(path, 0o666)  # there is no udev to do it


def _load_modules() -> "subprocess.Popen[bytes]":
    with open("/proc/cmdline") as cmdline:
        emulated = "tsc_early_khz=" in cmdline.read()
    linux.write("/etc/modprobe.d/fcvm.conf", OPTIONS + (EMULATED_OPTIONS if emulated else ""))
    return subprocess.Popen(
        ["modprobe", "-a", *kvm_modules(), "tun"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def kvm_modules(cpuinfo: str = "/proc/cpuinfo") -> list[str]:
    """KVM's module for this CPU.

    Raises:
        OSError: an x86-64 CPU without the extension.
    """
    if os.uname().machine != "x86_64":
        return []  # built in on arm64
    with open(cpuinfo) as file:
        flags = next((line.split() for line in file if line.startswith("flags")), [])
    for flag, module in (("vmx", "kvm_intel"), ("svm", "kvm_amd")):
        if flag in flags:
            return [module]
    raise OSError("the guest's CPU has neither vmx nor svm: the host's KVM does not pass it on")
