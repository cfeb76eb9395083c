"""How a VM comes to life. ``Boot`` starts a kernel; snapshots/restore.py has the other way, from a snapshot.

A start is asked, in this order, for the network, the disks, Firecracker, and then to ``go``; the supervisor holds
what it returns. Firecracker's directory gets every file under a fixed, relative name (firecracker/boot.py), so that a
snapshot of the VM can be restored in any other directory.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path

from fc_agent.structs import Struct, replace
from fcvm import host, hostpath
from fcvm.firecracker import boot
from fcvm.firecracker.process import Firecracker
from fcvm.images.adopt import adopt
from fcvm.network.attach import Network
from fcvm.setup import Assets
from fcvm.setup.kernel import NV2_OPTION, boot_args
from fcvm.storage import disks
from fcvm.vm import network
from fcvm.vm.spec import RunSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fcvm.storage.layout import Layout
    from fcvm.vm.supervisor import Supervisor


class Start(Struct, ABC):
    """The steps of a start."""

    @property
    def snapshot(self) -> str | None:
        """The tag of the user's snapshot that it is from; None for any other start."""
        return None

    def volumes(self, vm: Supervisor) -> Path | None:
        """What the volumes' server goes on from: the ``volumes.json`` of the snapshot. None: nothing."""
        return None

    @property
    def timeout(self) -> float:
        """Seconds until the agent says hello; under emulation beside other work a boot takes up to a minute."""
        return host.patience(300.0)

    @property
    def captures(self) -> bool:
        """Whether a boot snapshot is to be taken before the plan."""
        return False

    @abstractmethod
    def network(self, vm: Supervisor) -> AbstractContextManager[Network]:
        """The VM's namespace with its tap."""

    @abstractmethod
    def disks(self, vm: Supervisor) -> None:
        """Put the files that Firecracker opens into the VM's directory."""

    @abstractmethod
    def firecracker(self, vm: Supervisor) -> AbstractContextManager[Firecracker]:
        """Firecracker in the VM's namespace and directory."""

    @abstractmethod
    def go(self, vm: Supervisor) -> None:
        """Let the guest run."""

    @property
    def warm(self) -> str | None:
        """Tag of the warm start that is to be taken once the container is healthy; None for none."""
        return None

    def resumed(self, vm: Supervisor, seen: int) -> None:
        """The container's streams go on behind ``seen`` frames, which the VM that the snapshot is of has had."""
        return None

    def started(self, vm: Supervisor) -> None:
        """The container runs."""
        return None

    def capture(self, vm: Supervisor) -> bool:
        """Take the boot snapshot. Returns whether that broke the agent's connection: it then says hello again."""
        return False

    def another(self) -> Start | None:
        """What to try when the agent says nothing; None to give up."""
        return None

    def instead(self, layout: Layout) -> Start | None:
        """What to do where the snapshot that this is from cannot be restored; None to give up. One of ours is removed."""
        return None


class Boot(Start):
    """Boot a kernel with the assets from setup."""

    assets: Assets
    warm: str | None = None
    again: bool = False

    def network(self, vm: Supervisor) -> AbstractContextManager[Network]:
        """The VM's namespace with its tap."""
        return network.create(vm)

    def disks(self, vm: Supervisor) -> None:
        """Root, kernel, initrd and image by symbolic link, scratch as a clone of the formatted template."""
        directory = vm.directory
        kernel = hostpath.resolve(vm.spec.kernel) if vm.spec.kernel else self.assets.vmlinux
        link(self.assets.root_image, directory / boot.ROOT_DISK)
        link(kernel, directory / boot.KERNEL)
        link(self.assets.initrd, directory / boot.INITRD)
        link(adopt(hostpath.resolve(vm.spec.image.path), vm.layout), directory / boot.IMAGE_DISK)
        if vm.spec.nested is not None:
            from fcvm.nested import disk

            link(disk.adopt(hostpath.resolve(vm.spec.nested), vm.layout), directory / boot.NESTED_DISK)
        self.scratch(vm)

    def scratch(self, vm: Supervisor) -> None:
        """The VM's writable disk."""
        disks.make_scratch(vm.layout, vm.spec.scratch_size, vm.directory / boot.SCRATCH_DISK)

    def firecracker(self, vm: Supervisor) -> AbstractContextManager[Firecracker]:
        """A fresh Firecracker in the VM's namespace and directory."""
        arguments = tuple(vm.spec.firecracker_args)
        return Firecracker(self.assets.firecracker, vm.directory, vm.id, namespace=vm.network.namespace, arguments=arguments)

    def go(self, vm: Supervisor) -> None:
        """Configure it and start the kernel."""
        vm.timings.mark("spawn")
        shape = hardware(vm.spec, vm.network.tap, vm.network.mac)
        boot.configure(vm.firecracker.api, shape)
        boot.start(vm.firecracker.api)
        vm.timings.mark("configure")

    def another(self) -> Start | None:
        """Once more where the CPU is emulated: beside much other work a guest's kernel was seen to stand still early on."""
        return None if self.again or not host.emulated() else replace(self, again=True)


def hardware(spec: RunSpec, tap: str | None, mac: str | None) -> boot.Hardware:
    """What shapes the VM of ``spec`` before it boots."""
    nested = spec.nested is not None
    arguments = boot_args(
        emulated=host.emulated(), role="vm", nested=nested, nv2=NV2_OPTION in spec.firecracker_args
    )
    return boot.Hardware(
        cpu=spec.cpu,
        memory=spec.memory,
        boot_args=arguments,
        tap=tap,
        mac=mac,
        nested=nested,
        # An emulated fault takes half a millisecond, and tracking means one for every page of 4 KiB: a boot that leaves no snapshot
        # goes without (17.5 s for 24 to the first output), and below the machine, where it takes four times as long, every one.
        dirty_tracking=not (host.deep() or (host.emulated() and not spec.snapshot)),
    )


def link(target: Path, name: Path) -> None:
    """A symbolic link to a shared, read-only file."""
    os.symlink(os.path.abspath(target), name)
