"""Warm starts, `podman run --warm`: only the first run of a container has its application start up.

When that is healthy for the first time a snapshot is taken, named by everything that has shaped the VM and the container
until then. The next identical run is a clone of it, with its own identity, network and published ports.

What the container had written before the snapshot is kept with it and comes first in the output of every warm start, so
that whoever waits for "ready to accept connections" sees it as ever. A frame of the container's output that was
underway at that moment is sent again by the guest, so of what was kept as much is shown as the guest knows to have been
taken: nothing is lost and nothing comes twice.
"""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections.abc import Iterator
from pathlib import Path

from fc_agent.structs import replace
from fcvm import log
from fcvm.errors import ConflictError, FcvmError, NotFoundError, SnapshotError
from fcvm.setup import Assets, keys
from fcvm.snapshots import restore, store
from fcvm.storage.layout import Layout
from fcvm.vm import boot_snapshot, operations, output, plan
from fcvm.vm.clone import Clone
from fcvm.vm.spec import RunSpec
from fcvm.vm.start import Boot, Start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fcvm.vm.supervisor import Supervisor

KIND = "warm"
OWN = ("name", "hostname", "rows", "columns")  # of a container plan: what a restored guest is told anew
STARTED = 1  # frames of a session before its first output
LOST = struct.Struct(">Q")  # how output.log begins


def tag(spec: RunSpec, assets: Assets) -> str:
    """The name of the warm start for ``spec``: the hash of all that its application may have seen."""
    shape = plan.container(spec).to_json()
    for name in OWN:
        del shape[name]
    parts = [boot_snapshot.tag(spec, assets), spec.image.digest, shape, spec.dns, spec.volumes]
    return f"warm-{keys.of(parts)}"


class Warm(Clone):
    """A clone of a warm start, for a run of its own; ``otherwise`` is how to start if that does not come up."""

    otherwise: Boot | None = None

    def another(self) -> Start | None:
        return self.otherwise

    def instead(self, layout: Layout) -> Start | None:
        """Start otherwise, and take another one."""
        with contextlib.suppress(FcvmError):
            store.remove(layout, self.source)
        return replace(self.otherwise, warm=self.source) if self.otherwise else None

    def resumed(self, vm: Supervisor, seen: int) -> None:
        """Show what the container had written before the snapshot."""
        for stream, data in _written(store.find(vm.layout, self.source).path / store.OUTPUT, seen - STARTED):
            vm.output.write(stream, data)


def choose(spec: RunSpec, assets: Assets, layout: Layout) -> Start:
    """The quickest start there is for ``spec``."""
    start = boot_snapshot.choose(spec, assets, layout)
    if not spec.warm:
        return start
    name = tag(spec, assets)
    try:
        snapshot = store.find(layout, name)
        restore.find_disks(snapshot, layout)
    except NotFoundError:
        return replace(start, warm=name)
    except SnapshotError as error:
        log.info(f"not starting warm: {error.message}")
        with contextlib.suppress(FcvmError):
            store.remove(layout, name)
        return replace(start, warm=name)
    return Warm(assets, name, otherwise=start)


def capture(vm: Supervisor, name: str | None) -> None:
    """Take the warm start ``name`` of a VM whose container is healthy; None: none is wanted. The VM goes on."""
    if name is None:
        return
    try:
        took = operations.take(vm, name, kind=KIND, fill=lambda directory: _keep(vm.output, directory / store.OUTPUT))
    except ConflictError:  # another identical run was quicker
        return
    except FcvmError as error:  # a full disk, say: the run itself goes on
        log.warning(f"the warm start could not be taken: {error.message}")
        return
    boot_snapshot.trim(vm.layout, KIND)
    log.debug(f"took {name} ({took.kind}) in {took.paused:.3f} s")
    vm.timings.mark("warm start taken")


def _keep(written: output.Output, path: Path) -> None:
    """Save what was written: how many of the first chunks the log has lost already, and the others."""
    chunks, records = written.kept()
    with open(path, "wb") as file:
        file.write(LOST.pack(chunks - len(records)))
        for record in records:
            file.write(output.packed(*record))


def _written(path: Path, chunks: int) -> Iterator[tuple[output.Stream, bytes]]:
    """Of the first ``chunks`` chunks those that were saved at ``path``."""
    with open(path, "rb", buffering=0) as file:
        lost = int.from_bytes(file.read(LOST.size), "big")
        for _, stream, data in itertools.islice(output.records(file.fileno()), max(0, chunks - lost)):
            yield stream, data
