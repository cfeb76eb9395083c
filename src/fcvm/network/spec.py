"""What a VM's network is asked to be: the values of ``--network``, ``--publish``, ``--forward-localhost`` and ``--dns``."""

import ipaddress
import os
from collections.abc import Sequence
from ipaddress import IPv4Address

from fc_agent.structs import Struct
from fcvm.errors import UsageError
from fcvm.network import publish as publishing
from fcvm.network.publish import Publish

MODES = ("rootless", "bridged", "none")


class Port(Struct):
    """A port of the host's loopback that the guest may reach: ``--forward-localhost 5432,53/udp``."""

    number: int
    protocol: str = "tcp"

    def __str__(self) -> str:
        return f"{self.number}/{self.protocol}"


class Loopback(Struct):
    """Where the host's loopback is found: addresses in the order to be tried, and the SO_PRIORITY that they ask for."""

    addresses: tuple[str, ...] = ("127.0.0.1", "::1")
    priority: int | None = None


class NetworkSpec(Struct):
    """The network of one VM.

    Attributes:
        mode: ``rootless``, ``bridged`` or ``none``.
        publish: ports of the host that lead to the guest.
        forward_localhost: ports of the host's loopback that the guest reaches at host.containers.internal.
        dns: resolvers to ask instead of the host's.
        loopback: where ``forward_localhost`` leads.
        host: the address of the user's host, if that is not this system: what host.containers.internal stands for.
    """

    mode: str
    publish: tuple[Publish, ...] = ()
    forward_localhost: tuple[Port, ...] = ()
    dns: tuple[str, ...] = ()
    loopback: Loopback = Loopback()
    host: IPv4Address | None = None


def default_mode() -> str:
    """Bridged for root, rootless for everyone else."""
    return "bridged" if os.geteuid() == 0 else "rootless"


def parse(
    mode: str | None = None,
    publish: Sequence[str] = (),
    forward_localhost: Sequence[str] = (),
    dns: Sequence[str] = (),
) -> NetworkSpec:
    """The network that the command line asks for; every value may hold several with commas.

    Raises:
        UsageError: a value is malformed, or one does not go with the mode.
    """
    mode = mode or default_mode()
    if mode not in MODES:
        raise UsageError(f"There is no network mode {mode!r}.", hint=f"--network {'|'.join(MODES)}")
    spec = NetworkSpec(
        mode=mode,
        publish=publishing.parse_all(publish),
        forward_localhost=tuple(_port(word) for text in forward_localhost for word in text.split(",")),
        dns=tuple(_resolver(word) for text in dns for word in text.split(",")),
    )
    for option, value in (("--publish", spec.publish), ("--forward-localhost", spec.forward_localhost)):
        if mode == "none" and value:
            raise UsageError(f"{option} needs a network, and --network none gives the VM none.", hint=f"drop {option}")
    return spec


def _port(text: str) -> Port:
    number, slash, protocol = text.strip().partition("/")
    protocol = protocol.lower() if slash else "tcp"
    good = number.isascii() and number.isdecimal() and len(number) <= 5 and 1 <= int(number) <= 65535
    if not good or protocol not in publishing.PROTOCOLS:
        raise UsageError(
            f"--forward-localhost {text}: it is not a port.",
            hint="--forward-localhost takes PORT[/tcp|udp], for example 5432 or 5432,6379",
        )
    return Port(int(number), protocol)


def _resolver(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text.strip()))
    except ValueError:
        raise UsageError(f"--dns {text}: it is not an IP address.", hint="--dns 192.0.2.53") from None
