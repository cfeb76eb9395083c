"""A VM that starts from a user's snapshot: the container goes on where it was, as a VM of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from fc_agent.structs import replace
from fcvm import host
from fcvm.config import Config
from fcvm.errors import SnapshotError
from fcvm.firecracker.process import Firecracker
from fcvm.network.attach import Network
from fcvm.setup import Assets
from fcvm.snapshots import restore, store
from fcvm.snapshots.store import Snapshot
from fcvm.vm import network
from fcvm.vm.boot_snapshot import RESTORE_TIMEOUT
from fcvm.vm.spec import RunSpec
from fcvm.vm.start import Start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fcvm.vm.supervisor import Supervisor

# What a clone does not take over from the VM that the snapshot is of.
OWN = {"detach": False, "remove": True, "interactive": False, "publish": [], "timings": False, "log_prefix": None}


def spec_of(snapshot: Snapshot, **changes: Any) -> RunSpec:
    """The spec of a clone of ``snapshot``: that of the VM it is of, with ``changes`` (``name`` at least).

    Raises:
        SnapshotError: it is not a snapshot of a container, but one of ours (a boot snapshot); or of another fcvm's kind.
    """
    if not snapshot.manifest.spec:
        raise SnapshotError(f"The snapshot {snapshot.tag!r} is of no container.", hint="fcvm snapshots")
    try:
        spec = RunSpec.from_json({**snapshot.manifest.spec, **OWN})
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise SnapshotError(
            f"The snapshot {snapshot.tag!r} is of a VM that this fcvm does not know how to run: {error}.",
            hint=f"fcvm snapshots rm {snapshot.tag}, then make it again",
        ) from error
    spec = replace(spec, **{"network": snapshot.manifest.network, **changes})
    return replace(spec, forward_localhost=[]) if spec.network == "none" else spec  # there is nothing to forward over


class Clone(Start):
    """Load the snapshot ``source``, its memory mapped straight from the file."""

    assets: Assets
    source: str
    again: bool = False

    @property
    def snapshot(self) -> str | None:
        return self.source

    def network(self, vm: Supervisor) -> AbstractContextManager[Network]:
        """A namespace of its own: the guest's address is the same in each."""
        return network.create(vm)

    def disks(self, vm: Supervisor) -> None:
        """The snapshot's read-only disks by link, its writable one by reflink."""
        snapshot = store.find(vm.layout, self.source)
        restore.furnish(vm.directory, snapshot, restore.find_disks(snapshot, vm.layout))

    def volumes(self, vm: Supervisor) -> Path:
        """Those that the snapshot's VM had open."""
        return store.find(vm.layout, self.source).path / store.VOLUMES

    def firecracker(self, vm: Supervisor) -> AbstractContextManager[Firecracker]:
        return self._loaded(vm)

    @contextlib.contextmanager
    def _loaded(self, vm: Supervisor) -> Iterator[Firecracker]:
        arguments = tuple(vm.spec.firecracker_args)
        with (
            store.use(vm.layout, self.source) as snapshot,
            Firecracker(
                self.assets.firecracker, vm.directory, vm.id, namespace=vm.network.namespace, arguments=arguments
            ) as vmm,
        ):
            vm.timings.mark("spawn")
            restore.check(snapshot, vmm)
            restore.load(vmm, snapshot, dirty_tracking=not host.deep())
            vm.timings.mark("load")
            yield vmm

    def go(self, vm: Supervisor) -> None:
        restore.resume(vm.firecracker.api)
        vm.timings.mark("resume")

    @property
    def timeout(self) -> float:
        return host.patience(RESTORE_TIMEOUT)

    def another(self) -> Start | None:
        """Load it once more: under emulation a vCPU of a restored guest may never wake up."""
        return None if self.again else replace(self, again=True)


def start(source: str, config: Config, assets: Assets) -> Clone:
    """A direct clone of the snapshot ``source``."""
    return Clone(assets, source)
