"""A VM's network as its options say, and its published ports on the host that the user sees.

Where the VMs run in the machine, a port is published twice: by the VM in the machine, on any address, and by the
machine's keeper on the user's host, where the user said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fc_agent.structs import replace
from fcvm.machine import inside
from fcvm.network import attach, publish
from fcvm.network import spec as network_spec
from fcvm.network.attach import Network
from fcvm.network.publish import Publish
from fcvm.network.spec import NetworkSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fcvm.vm.supervisor import Supervisor


def create(vm: Supervisor) -> Network:
    """The VM's namespace with its tap; its ports are published where the VMs are."""
    wanted = network_spec.parse(vm.spec.network, (), vm.spec.forward_localhost, vm.spec.dns)
    return attach.create(replace(placed(wanted), publish=ports(vm)), vm.id, vm.directory)


def placed(wanted: NetworkSpec) -> NetworkSpec:
    """``wanted`` with the user's host in the place of this system, where that is the machine."""
    if not inside.here():
        return wanted
    return replace(wanted, loopback=inside.HOST_LOOPBACK, host=inside.host_address())


def ports(vm: Supervisor) -> tuple[Publish, ...]:
    """What is to be published where the VMs are."""
    wanted = publish.parse_all(vm.spec.publish)
    return tuple(replace(port, host_ip="") for port in wanted) if inside.here() else wanted


@contextlib.contextmanager
def shown(vm: Supervisor) -> Iterator[dict[str, Any]]:
    """The network as `fcvm ls` shows it, its ports published on the user's host inside the block.

    Raises:
        ConflictError: a port is taken there. MachineError: the machine does not answer.
    """
    described = vm.network.describe()
    wanted = publish.parse_all(vm.spec.publish)
    if not wanted or not inside.here():
        yield described
        return
    asked = [
        inside.Port(port.protocol, port.host_ip, port.host_port, here["host_port"])
        for port, here in zip(wanted, described["ports"], strict=True)
    ]
    with inside.publish(asked) as published:
        described["ports"] = [
            {**here, "host_ip": port.host_ip, "host_port": number}
            for port, here, number in zip(wanted, described["ports"], published.host_ports, strict=True)
        ]
        yield described
