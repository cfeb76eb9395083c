"""What this host can do: KVM, emulation. Cheap enough to ask at every command.

A ``/dev/kvm`` that opens is not enough. Some hosts are virtual machines with a *software* KVM (PVM): it works without
``vmx`` or ``svm``, but can only run kernels made for it. So on x86-64 the CPU must have the extension as well.
"""

import errno
import fcntl
import os

from fc_agent.structs import Struct
from fcvm.config import Config
from fcvm.errors import HostError

KVM_DEVICE = "/dev/kvm"

# <linux/kvm.h>
KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_API_VERSION = 12  # the only one since Linux 2.6.22


class Kvm(Struct):
    """Whether Firecracker can run guests here; if not, ``reason`` says why in one sentence, ``hint`` what helps.

    ``forbidden``: all that is missing is this user's permission.
    """

    usable: bool
    reason: str
    hint: str | None = None
    forbidden: bool = False


def kvm() -> Kvm:
    """The state of KVM for this user on this host, looked at once."""
    global _kvm
    if _kvm is None:
        _kvm = examine_kvm(cpu_flags(), KVM_DEVICE, loaded_modules())
    return _kvm


_kvm: Kvm | None = None


def examine_kvm(flags: frozenset[str], device: str | os.PathLike[str], modules: frozenset[str], machine: str | None = None) -> Kvm:
    """The state of KVM on a host with these CPU flags, KVM device and kernel modules.

    Arguments:
        machine: its architecture as uname(2) says it; None for this host's.
    """
    machine = machine or os.uname().machine
    extension = "vmx" if "vmx" in flags else "svm" if "svm" in flags else None
    if machine == "x86_64" and extension is None:
        if os.path.exists(device):
            return Kvm(
                False,
                f"{device} exists, but the CPU has neither vmx nor svm: it is a software KVM, which cannot run ordinary "
                "kernels.",
                NO_EXTENSION_HINT,
            )
        return Kvm(False, "The CPU has neither vmx nor svm, so there is no KVM.", NO_EXTENSION_HINT)
    if machine == "x86_64" and "kvm_pvm" in modules:
        return Kvm(False, "The kernel uses a software KVM (kvm_pvm) instead of the CPU's extension.", "rmmod kvm_pvm")
    module = {"vmx": "kvm_intel", "svm": "kvm_amd"}.get(extension or "", "kvm")
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return Kvm(False, f"{device} does not exist: the kernel's KVM is not loaded.", f"sudo modprobe {module}")
    except PermissionError:
        return Kvm(False, f"You may not open {device}.", FORBIDDEN_HINT, forbidden=True)
    except OSError as error:
        return Kvm(False, f"{device} cannot be opened: {error.strerror}.", f"sudo modprobe {module}")
    try:
        version = fcntl.ioctl(fd, KVM_GET_API_VERSION)
        if version != KVM_API_VERSION:
            return Kvm(False, f"{device} speaks version {version} of KVM's interface instead of {KVM_API_VERSION}.")
        os.close(fcntl.ioctl(fd, KVM_CREATE_VM, 0))
    except OSError as error:
        what = "is not a KVM device" if error.errno == errno.ENOTTY else f"cannot make a VM: {error.strerror}"
        return Kvm(False, f"{device} {what}.", "dmesg | grep -i kvm")
    finally:
        os.close(fd)
    return Kvm(True, f"{device} works ({extension or machine}).")


def nesting(parameters: str | os.PathLike[str] = "/sys/module", machine: str | None = None, cmdline: str | None = None) -> Kvm:
    """Whether guests of this host can use KVM themselves: a parameter of the host's KVM module.

    Arguments:
        parameters: where the kernel shows its modules' parameters.
        machine, cmdline: architecture and kernel command line of the host; None for this one's.
    """
    if (machine or os.uname().machine) == "aarch64":
        told = read("/proc/cmdline") if cmdline is None else cmdline
        if "kvm-arm.mode=nested" in told.split():
            return Kvm(True, "Nested virtualization is on (kvm-arm.mode=nested).")
        return Kvm(
            False,
            "Nested virtualization is off: VMs cannot run VMs.",
            "boot with kvm-arm.mode=nested (FEAT_NV2, Linux 6.18 or later)",
        )
    for module in ("kvm_intel", "kvm_amd"):
        value = read(os.path.join(parameters, module, "parameters/nested")).strip()
        if value in ("Y", "1"):
            return Kvm(True, f"Nested virtualization is on ({module}).")
        if value:
            return Kvm(
                False,
                f"Nested virtualization is off ({module}): VMs cannot run VMs.",
                f"echo 'options {module} nested=1' | sudo tee /etc/modprobe.d/{module}.conf; "
                f"sudo modprobe -r {module}; sudo modprobe {module}",
            )
    return Kvm(False, "The kernel does not say whether nested virtualization is on.", "sudo modprobe kvm_intel || sudo modprobe kvm_amd")


FORBIDDEN_HINT = (
    "sudo usermod -aG kvm $USER, then log in again; or FCVM_MACHINE=always, which emulates a host and is slower"
)
NO_EXTENSION_HINT = "turn on virtualization in the firmware; on a virtual machine, nested virtualization where it runs"


def need_kvm() -> None:
    """Raise HostError, with what helps, if Firecracker cannot run guests here."""
    state = kvm()
    if not state.usable:
        raise HostError(state.reason, hint=state.hint or "fcvm doctor")


def uses_machine(config: Config) -> bool:
    """Whether VM commands are to be forwarded to the machine.

    Not just because the user may not open a /dev/kvm that works: that is mended in a minute, and emulation is slow for ever.
    """
    return config.machine == "always" or (config.machine == "auto" and not kvm().usable and not kvm().forbidden)


def user_name() -> str:
    """Our user's name; its number where /etc/passwd has none, as in a container that was given any number."""
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def cpu_flags(cpuinfo: str | os.PathLike[str] = "/proc/cpuinfo") -> frozenset[str]:
    """The CPU's feature flags, as the kernel names them (``Features`` on arm64)."""
    for line in read(cpuinfo).splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def loaded_modules(path: str | os.PathLike[str] = "/proc/modules") -> frozenset[str]:
    """The names of the kernel's loaded modules."""
    return frozenset(line.split()[0] for line in read(path).splitlines() if line)


def emulated() -> bool:
    """Whether this CPU is emulated in software: we are in the machine, or in a guest below it.

    Told by the kernel command line (fcvm passes ``tsc_early_khz`` to all kernels that boot under emulation), or by the
    hypervisor's CPUID signature, which is that of QEMU's emulator.
    """
    global _emulated
    if _emulated is None:
        from fcvm.tsc import hypervisor

        _emulated = "tsc_early_khz=" in read("/proc/cmdline") or hypervisor() == "TCGTCGTCGTCG"
    return _emulated


_emulated: bool | None = None


def deep() -> bool:
    """Whether we are in a VM below the machine: emulated, and every exit of a VM here passes through two KVMs.

    One costs a millisecond on an idle host, so what saves exits is worth much here: see ``fcvm.vm.start.hardware``.
    """
    return emulated() and "fcvm.role=vm" in read("/proc/cmdline").split()


def patience(seconds: float) -> float:
    """A limit for what takes ``seconds`` at most in a VM of an ordinary or emulated host: more below the machine."""
    return seconds * 6 if deep() else seconds


def read(path: str | os.PathLike[str]) -> str:
    """A file that the kernel makes; empty if it is not there."""
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""
