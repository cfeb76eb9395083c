"""QEMU's command line for the machine, from a frozen description of it.

The choices, measured on a host without KVM:

- ``-cpu EPYC,svm=on``: an emulated SVM, so the machine's own kernel has a real /dev/kvm with nested paging. QEMU 10 is
  needed: 7.2 gets XSAVE of nested guests wrong. ``+arat`` takes an idle machine from 1.6 % of a CPU to 0.2 %.
  ``+vgif`` would save VMs that run VMs a third of their exits, but one of the machine's CPUs then fell asleep for good.
- One CPU more than wanted, on which no VM ever runs (``fc_agent/machine.py`` keeps every program off it). QEMU 10.0 to at
  least 10.0.13 has a data race: every XRSTOR of every CPU clears a flag of the *first* CPU, not atomically
  (``cpu_set_fpus`` and ``cpu_clear_ignne``, target/i386/tcg/fpu_helper.c), and the flags beside it say whether that CPU is
  in a guest, with nested paging, with interrupts. Where VMs ran on the first CPU, about one in ten beside another VM went
  astray: it stood still, ended by a triple fault, or took the machine with it.
- ``tb-size``: MiB of translated code, an eighth of the machine's memory. When it is full all of it is thrown away, and a
  boot fills 200 MiB: the kernel of every guest lies elsewhere. A run from a boot snapshot executes pages of a file that
  others have executed: it takes 3.1 s where it finds them translated, and up to 7.7 s where not. Cold runs and such runs
  in turn, with 256 and with 1024 MiB: 11.5 to 16.4 and 12.9 to 14.1 s, 6.1 and 4.4 s. 64 MiB are too few for one run.
- The memory is a shared memory file, because the keeper serves two devices itself, the host's files (``hostfs.py``) and
  connections (``vsock.py``), and reads requests straight from it.
- No free page reporting: it would return what the machine frees to the host at once, and every page would cost the
  host a fault again: the first touch of a page took 60 to 100 us with it and 25 us without.
- The data disk keeps QEMU's default ``cache=writeback``: the host's page cache holds what the machine has written, so it
  survives QEMU's SIGKILL; flushes of btrfs are honoured, so a power cut of the host leaves a consistent disk too
  (``unsafe`` would not).
"""

import re
from collections.abc import Mapping
from pathlib import Path

from fc_agent.structs import Struct
from fcvm import process
from fcvm.errors import HostError
from fcvm.machine.addresses import ADDRESS, DNS, GATEWAY, NETWORK, PREFIX

PROGRAM = "qemu-system-x86_64"
OLDEST = 10
INSTALL = "apt-get install -t bookworm-backports qemu-system-x86  (Debian 12; Debian 13 has it without -t)"

CONTROL_PORT = "fcvm.control"
HOST_TAG = "host"


class Spec(Struct):
    """What QEMU is to run; memory in MiB, ``cpus`` for programs. ``fds`` of the sockets to the keeper, which QEMU inherits."""

    cpus: int
    memory: int
    kernel: Path
    initrd: Path
    root: Path
    disk: Path
    oem: Path
    console: Path
    control_fd: int
    qmp_fd: int
    hostfs_fd: int
    vsock_fd: int
    kernel_arguments: str


def command(spec: Spec, program: str) -> list[str]:
    """The command line that starts ``spec``."""
    options: list[tuple[str, str]] = [
        ("-name", "fcvm-machine,process=fcvm-machine"),
        ("-machine", "q35,memory-backend=memory,usb=off,vmport=off"),
        ("-accel", f"tcg,thread=multi,tb-size={translated(spec.memory)}"),
        ("-cpu", "EPYC,svm=on,+arat"),
        ("-smp", str(spec.cpus + 1)),
        ("-m", f"{spec.memory}M"),
        ("-object", f"memory-backend-memfd,id=memory,size={spec.memory}M,share=on"),
        ("-kernel", str(spec.kernel)),
        ("-initrd", str(spec.initrd)),
        ("-append", spec.kernel_arguments),
        ("-smbios", f"type=11,path={_comma(spec.oem)}"),
        ("-chardev", f"file,id=console,path={_comma(spec.console)}"),
        ("-serial", "chardev:console"),
        ("-drive", f"file={_comma(spec.root)},if=virtio,format=raw,readonly=on,cache=writeback"),
        ("-drive", f"file={_comma(spec.disk)},if=virtio,format=raw,cache=writeback,discard=unmap,detect-zeroes=unmap"),
        ("-netdev", f"user,id=net,net={NETWORK}/{PREFIX},host={GATEWAY},dns={DNS},dhcpstart={ADDRESS},ipv6=off"),
        ("-device", "virtio-net-pci,netdev=net,romfile="),
        ("-chardev", f"socket,id=hostfs,fd={spec.hostfs_fd}"),
        # 1024 entries: the driver takes 4 for headers and one a page, so requests can have 1 MiB.
        ("-device", f"vhost-user-fs-pci,chardev=hostfs,tag={HOST_TAG},queue-size=1024"),
        ("-chardev", f"socket,id=vsock,fd={spec.vsock_fd}"),
        ("-device", "vhost-user-vsock-pci,chardev=vsock"),
        ("-device", "virtio-serial-pci"),
        ("-chardev", f"socket,id=control,fd={spec.control_fd}"),
        ("-device", f"virtserialport,chardev=control,name={CONTROL_PORT}"),
        ("-device", "virtio-balloon-pci,id=balloon,deflate-on-oom=on"),
        ("-object", "rng-random,id=entropy,filename=/dev/urandom"),
        ("-device", "virtio-rng-pci,rng=entropy"),
        ("-chardev", f"socket,id=qmp,fd={spec.qmp_fd}"),
        ("-mon", "chardev=qmp,mode=control"),
    ]
    flags = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    return [program, *flags, *(word for option in options for word in option)]


def translated(memory: int) -> int:
    """MiB of translated code for a machine with so many MiB of memory."""
    return min(1024, max(256, memory // 8))


def _comma(path: Path) -> str:
    """A path inside a QEMU option: a comma is written twice."""
    return str(path).replace(",", ",,")


def find() -> tuple[str, str]:
    """QEMU's path and version. Raises HostError: it is missing or too old, ProcessError: it does not run."""
    try:
        program = process.find(PROGRAM)
    except HostError as error:
        raise HostError(f"{PROGRAM} is not installed.", hint=INSTALL) from error
    text = process.run([program, "--version"]).stdout.decode()
    found = re.search(r"version ((\d+)\.[\d.]*)", text)
    if found is None or int(found[2]) < OLDEST:
        raise HostError(f"QEMU is too old for nested guests: {text.strip() or 'of no version'}; fcvm needs {OLDEST}.", hint=INSTALL)
    return program, found[1]


def devices(program: str) -> Mapping[str, bool]:
    """Which of the devices that the machine needs this QEMU was built with."""
    text = process.run([program, "-device", "help"]).stdout.decode()
    return {name: f'"{name}"' in text for name in ("vhost-user-fs-pci", "vhost-user-vsock-pci", "virtio-balloon-pci", "virtserialport")}
