"""Who this VM is: after a boot, and after it was restored from a snapshot that others are restored from as well."""

import contextlib
import socket
import time

from fc_agent import linux, network, sockets
from fc_agent.protocol import Identity, NetworkPlan

MACHINE_ID = "/etc/machine-id"


def take(identity: Identity, plan: NetworkPlan | None, *, restored: bool) -> None:
    """Become ``identity``; randomness first, for everything else may draw on it.

    Arguments:
        plan: the network that this VM has.
        restored: what the network remembers is another VM's.
    """
    linux.add_entropy(identity.seed)
    if identity.wall_clock_ns:
        time.clock_settime_ns(time.CLOCK_REALTIME, identity.wall_clock_ns)
    socket.sethostname(identity.hostname)
    with contextlib.suppress(OSError):  # a full or read-only disk
        linux.write(MACHINE_ID, f"{identity.machine_id}\n")
    with contextlib.suppress(OSError):
        network.write_files(plan, identity.hostname)
    if plan is not None:
        network.configure(plan)
        if restored:
            network.forget_neighbours()
            network.announce(plan)
            sockets.destroy_connections()


def adjust_clock(by: int) -> int:
    """Move CLOCK_REALTIME by so many nanoseconds; returns what it shows now."""
    if by:
        time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() + by)
    return time.time_ns()
