"""The command line that a guest kernel boots with."""

import os

from fcvm import tsc

# console: kernel and agent messages go to the VM's console log. reboot=k, panic=-1: a guest that reboots or panics ends
# its VMM at once. i8042: Firecracker's has nothing but the reset line. mitigations=off: a guest holds one container, and
# the VM is the boundary. The rest saves boot time. Firecracker has no PCI; the machine (QEMU) has.
COMMON = ("console=ttyS0", "panic=-1", "quiet", "mitigations=off", "cryptomgr.notests", "rcupdate.rcu_expedited=1")
X86 = ("reboot=k", "random.trust_cpu=on", "i8042.noaux", "i8042.nomux", "i8042.dumbkbd")
ARM = ("reboot=k", "keep_bootcon")
VM = ("pci=off",)
# The machine's other CPUs are started by its init once its PCI devices have their addresses: while one CPU of QEMU's changes
# what is at which address, another one's access to a device can go to a wrong one. (What waited for QEMU's lock in the
# middle of an access, do_st_mmio_leN in accel/tcg/cputlb.c, goes on with what was true before.) Seen: QEMU ended by an
# assertion, a write outside of an MSI-X table, most likely one to a CPU's timer; a timer that never rang. A start in fifteen.
MACHINE = ("maxcpus=1",)
HZ = 250  # of Debian's kernels

# Under emulation with a busy host CPU the kernel's calibration of the TSC against the PIT fails, and it hangs. QEMU's
# emulated TSC is the host's, so its frequency can be told.
EMULATED = ("tsc=reliable", "no_timer_check")

# For a VM that runs VMs under emulation, where every interrupt that meets one of those costs milliseconds: 250 a second, and
# they do nothing else any more. The timer of the CPU's APIC in periodic mode is the one whose rate KVM can limit
# (TIMER_PERIOD); the kernel's jiffies then run slow, its clocks do not.
COARSE = ("nohz=off", "highres=off", "lapic=notscdeadline")

# arm64: the option of a Firecracker that gives guests their own EL2 (FEAT_NV2), and what their kernel then needs to be told.
NV2_OPTION = "--enable-nv2"
NV2 = ("kvm-arm.mode=nested", "numa=off", "arm64.nv2")


def boot_args(*, emulated: bool, role: str, nested: bool = False, nv2: bool = False, machine: str | None = None) -> str:
    """The kernel command line.

    Arguments:
        emulated: the CPU that will run it is emulated by software, however many levels below.
        role: ``"vm"`` or ``"machine"``.
        nested: VMs shall run in it.
        nv2: Firecracker is given NV2_OPTION.
        machine: architecture as uname(2) says it; None for this host's.
    """
    x86 = (machine or os.uname().machine) == "x86_64"
    words = [*COMMON, *(X86 if x86 else ARM), *(VM if role == "vm" else MACHINE)]
    if emulated and x86:
        words += [f"tsc_early_khz={tsc.tsc_khz()}", *EMULATED, *(COARSE if nested else ())]
        if role == "machine":  # or each CPU finds out by itself, in up to 1.4 s
            words.append(f"lpj={tsc.tsc_khz() * 1000 // HZ}")
    if nv2 and not x86:
        words += NV2
    return " ".join([*words, f"fcvm.role={role}"])
