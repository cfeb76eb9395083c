"""What the host's own network says, and the sysctls that forwarding needs.

``net.ipv4.conf.<interface>.forwarding`` is set for the interfaces that need it and were without; ``net.ipv4.ip_forward`` would
turn the host into a router between all of its networks.
"""

import fcntl
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

from fcvm import log
from fcvm.errors import NetworkError
from fcvm.linux import netlink, rtnetlink
from fcvm.linux.rtnetlink import Link
from fcvm.network.address import FAR
from fcvm.network.subnets import PREFIX

# /proc/sys/net shows the network namespace of the thread that looks
CONF4 = Path("/proc/sys/net/ipv4/conf")
CONF6 = Path("/proc/sys/net/ipv6/conf")
SIOCGIFADDR = 0x8915  # linux/sockios.h


def uplink(route: netlink.Socket, version: int = 4) -> Link | None:
    """The interface of the host's default route; None without one."""
    found = rtnetlink.match(route, FAR[version])
    link = rtnetlink.link(route, found.oif) if found and found.oif else None
    return None if link is None or link.loopback else link


def enable_forwarding() -> list[str]:
    """Let IPv4 packets that arrive on the host's networks be forwarded; returns what was changed, as ``sysctl`` shows it.

    Raises:
        NetworkError: it may not be changed.
    """
    changed = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in os.listdir(CONF4):
            if name in ("all", "default", "lo") or name.startswith(PREFIX) or _read(CONF4 / name / "forwarding") != "0":
                continue
            with suppress(OSError):  # without an address nothing arrives there that is for a VM
                fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("40s", name.encode()))
                changed += _write(CONF4 / name / "forwarding", "1", f"net.ipv4.conf.{name}.forwarding")
    return changed


def enable_forwarding6(uplink: str, inner: str) -> list[str] | None:
    """The same for IPv6, between two interfaces; None if it cannot be had without harm, then the VM is without IPv6.

    A host that forwards stops listening to router advertisements (RFC 4861), and with them it could lose its own address.
    Linux 6.17 can forward on single interfaces without that; before, such interfaces are told to go on listening.
    """
    if _read(CONF6 / "all" / "forwarding") == "1":
        return []
    changed: list[str] = []
    try:
        if (CONF6 / "all" / "force_forwarding").exists():
            _write(CONF6 / inner / "force_forwarding", "1", "")
            if _read(CONF6 / uplink / "force_forwarding") == "0":
                name = f"net.ipv6.conf.{uplink}.force_forwarding"
                changed += _write(CONF6 / uplink / "force_forwarding", "1", name)
            return changed
        for name in os.listdir(CONF6):
            if name != "all" and _read(CONF6 / name / "accept_ra") == "1":
                changed += _write(CONF6 / name / "accept_ra", "2", f"net.ipv6.conf.{name}.accept_ra")
        return [*changed, *_write(CONF6 / "all" / "forwarding", "1", "net.ipv6.conf.all.forwarding")]
    except NetworkError as error:
        log.info(f"The VM is without IPv6: {error.message}")
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:  # the interface has gone
        return None


def _write(path: Path, value: str, name: str) -> list[str]:
    try:
        path.write_text(value)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise NetworkError(
            f"{name} cannot be set to {value}, and without it VMs do not reach the network: {error.strerror}.",
            hint=f"sysctl -w {name}={value} on the host, or --network rootless",
        ) from error
    if not name:
        return []
    log.warning(f"Set {name}={value}, which VMs need to reach the network.")
    return [f"{name}={value}"]
