"""The command line that a guest kernel boots with."""

import os

from fcvm import host

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
