"""What the guest's agent is told to do, made of a VM's spec."""

from __future__ import annotations

import base64
import os
import time

from fc_agent.protocol import VOLUME_PORT, ContainerPlan, HealthPlan, Identity, NetworkPlan, Plan, VolumePlan
from fcvm.agent.terminal import ours, size
from fcvm.vm.spec import RunSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fcvm.vm.supervisor import Supervisor

ENTROPY = 64  # bytes of the host's randomness for each guest


def message(vm: Supervisor) -> dict[str, Any]:
    """The ``plan`` message for a VM whose agent waits for one."""
    plan = Plan(identity(vm), container(vm.spec), network(vm), volumes(vm.spec), nested=vm.spec.nested is not None)
    return {"type": "plan", **plan.to_json()}


def restored(vm: Supervisor) -> dict[str, Any]:
    """The ``restored`` message for a VM that a snapshot was loaded into: it takes a new identity and goes on."""
    return {"type": "restored", "identity": identity(vm, clone=True).to_json()}


def identity(vm: Supervisor, *, clone: bool = False) -> Identity:
    """The VM's identity, with the time of now; a clone also gets its network, and drops the sessions of its source."""
    return Identity(
        hostname=vm.spec.name,
        machine_id=vm.machine_id,
        entropy=base64.b64encode(os.urandom(ENTROPY)).decode(),
        wall_clock_ns=time.time_ns(),
        network=network(vm) if clone else None,
        drop_sessions=clone,
    )


def network(vm: Supervisor) -> NetworkPlan | None:
    """What the guest's interface is to be configured with."""
    return NetworkPlan(**vm.network.guest.json())


def volumes(spec: RunSpec) -> list[VolumePlan]:
    """Where the guest finds its volumes, and where it shows them."""
    return [
        VolumePlan(VOLUME_PORT + index, volume.guest, volume.read_only, volume.file)
        for index, volume in enumerate(spec.volumes)
    ]


def container(spec: RunSpec) -> ContainerPlan:
    """The container's part."""
    where = ours() if spec.tty and not spec.detach else None
    rows, columns = (24, 80) if where is None else size(where)
    return ContainerPlan(
        image=spec.image.id,
        name=spec.name,
        entrypoint=spec.entrypoint,
        command=spec.command,
        env=spec.env,
        user=spec.user,
        workdir=spec.workdir,
        privileged=spec.privileged,
        labels=spec.labels,
        tty=spec.tty,
        stdin=spec.interactive,
        stop_timeout=spec.stop_timeout,
        hostname=spec.name,
        health=HealthPlan(kind="http", url=spec.health_check) if spec.health_check else HealthPlan(kind="image"),
        rows=rows,
        columns=columns,
    )
