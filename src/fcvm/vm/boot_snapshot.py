"""Boot snapshots: only the first `podman run` of a combination boots a kernel.

As soon as the agent of a booted VM waits for its plan, before any container image or network is used, a snapshot is
taken, named by everything that has shaped the VM until then. Every later run restores it, puts its own image disk in
the place of the first run's, and hands the agent its plan. A snapshot that cannot be restored here any more is removed
and the run boots.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

from fc_agent.structs import asdict
from fcvm import __version__, host, hostpath, log
from fcvm.errors import ConflictError, FcvmError, NotFoundError, SnapshotError
from fcvm.firecracker import boot
from fcvm.firecracker.process import Firecracker
from fcvm.setup import Assets, keys
from fcvm.snapshots import create, restore, store, written
from fcvm.snapshots.manifest import Manifest, this_host
from fcvm.storage import disks
from fcvm.storage.layout import Layout
from fcvm.vm.spec import RunSpec
from fcvm.vm.start import Boot, hardware

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fcvm.vm.supervisor import Supervisor

KIND = "boot"
KEPT = 8  # of a kind: each takes some 200 MB, and every agent, kernel, image and size has its own
RESTORE_TIMEOUT = 60.0  # seconds until the agent of a restored guest is back; it takes a few, under emulation


def tag(spec: RunSpec, assets: Assets) -> str:
    """The name of the boot snapshot for ``spec``: the hash of all that the guest has seen before its plan.

    What setup has made is named by its content; a kernel or Firecracker of the user's own may be built anew in its place.
    """
    shape = asdict(hardware(spec, tap="tap0", mac=None))
    kernel = keys.of_status(hostpath.resolve(spec.kernel)) if spec.kernel else str(assets.vmlinux)
    files = [kernel, str(assets.initrd), str(assets.root_image), keys.of_status(assets.firecracker)]
    return f"boot-{keys.of([__version__, shape, *files, spec.scratch_size, spec.firecracker_args, asdict(this_host())])}"


class BootAndCapture(Boot):
    """Boot, and take the boot snapshot ``name`` on the way."""

    name: str = ""

    @property
    def captures(self) -> bool:
        return True

    def capture(self, vm: Supervisor) -> bool:
        """Take the snapshot; the agent's connection breaks by it, so its plan goes out on the next one."""
        if tag(vm.spec, self.assets) != self.name:  # the user's kernel was replaced, and we may have booted either
            return False
        manifest = Manifest(
            hardware=hardware(vm.spec, vm.network.tap, vm.network.mac),
            disks={},
            firecracker=self.assets.firecracker_version,
            host=this_host(),
            created_at=time.time(),
            kind=KIND,
        )
        try:
            took = create.take(vm.layout, self.name, vm.firecracker, manifest)
        except ConflictError:  # another first run was quicker
            return False
        except FcvmError as error:  # a full disk, say: the run itself goes on
            log.warning(f"the boot snapshot could not be taken: {error.message}")
            return False
        trim(vm.layout, KIND)
        log.debug(f"took {self.name} ({took.kind}) in {took.paused:.3f} s")
        vm.timings.mark("boot snapshot")
        return True


class Restore(Boot):
    """Start from the boot snapshot ``source``."""

    source: str = ""

    def firecracker(self, vm: Supervisor) -> AbstractContextManager[Firecracker]:
        return self._restored(vm)

    @contextlib.contextmanager
    def _restored(self, vm: Supervisor) -> Iterator[Firecracker]:
        with store.use(vm.layout, self.source) as snapshot, Boot.firecracker(self, vm) as vmm:
            vm.timings.mark("spawn")
            restore.load(vmm, snapshot)
            vm.timings.mark("load")
            if host.emulated():
                written.give(vmm, snapshot)
                vm.timings.mark("pages")
            yield vmm

    def started(self, vm: Supervisor) -> None:
        """What the first one has written until now, later ones are given."""
        if host.emulated():
            with contextlib.suppress(FcvmError):  # somebody has removed the snapshot
                snapshot = store.find(vm.layout, self.source)
                if not (snapshot.path / store.WRITTEN).exists():
                    written.record(vm.firecracker.pid, snapshot)

    def scratch(self, vm: Supervisor) -> None:
        """A clone of the snapshot's disk: the guest has it mounted."""
        disks.clone(store.find(vm.layout, self.source).scratch, vm.directory / boot.SCRATCH_DISK)

    @property
    def timeout(self) -> float:
        return RESTORE_TIMEOUT

    def another(self) -> Boot:
        """Now and then, under emulation, a vCPU of a restored guest never wakes up: then it is booted."""
        return Boot(self.assets, self.warm)

    def instead(self, layout: Layout) -> Boot:
        """Boot, and take another one."""
        with contextlib.suppress(FcvmError):
            store.remove(layout, self.source)
        return BootAndCapture(self.assets, self.warm, name=self.source)

    def go(self, vm: Supervisor) -> None:
        restore.replace_drive(vm.firecracker.api, "image", boot.IMAGE_DISK)
        if vm.spec.nested is not None:
            restore.replace_drive(vm.firecracker.api, "nested", boot.NESTED_DISK)
        restore.resume(vm.firecracker.api)
        vm.timings.mark("resume")


def trim(layout: Layout, kind: str) -> None:
    """Remove the oldest snapshots of a kind that can be made again, so that ``KEPT`` stay; one in use stays as well."""
    found = [snapshot for snapshot in store.snapshots(layout) if snapshot.manifest.kind == kind]
    for snapshot in found[:-KEPT]:
        with contextlib.suppress(FcvmError):
            store.remove(layout, snapshot.tag)


def choose(spec: RunSpec, assets: Assets, layout: Layout) -> Boot:
    """The quickest start there is for ``spec``."""
    if not spec.snapshot or host.deep():  # without dirty tracking a snapshot is of all memory: dearer than many boots
        return Boot(assets)
    name = tag(spec, assets)
    try:
        snapshot = store.find(layout, name)
    except NotFoundError:
        return BootAndCapture(assets, name=name)
    except SnapshotError as error:
        log.info(f"booting: {error.message}")
        with contextlib.suppress(FcvmError):
            store.remove(layout, name)
        return BootAndCapture(assets, name=name)
    return Restore(assets, source=snapshot.tag)
