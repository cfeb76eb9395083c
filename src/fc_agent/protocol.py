"""What host and guest tell each other over the control channel: docs/architecture.md, "Control".

Structs with ``to_json`` and ``from_json``. The version is raised when a message changes its meaning; a guest that
was frozen in a snapshot may be older than the host that restores it.
"""

from __future__ import annotations

import base64
from types import UnionType

from fc_agent.structs import Struct, asdict, field, fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal, Self

PROTOCOL = 1

CONTROL_PORT = 4999  # vsock, guest to host
SESSION_PORT = 4998  # vsock, host to guest
VOLUME_PORT = 5000  # vsock, guest to host: of the first volume; the others follow
LOOPBACK_PRIORITY = 6  # SO_PRIORITY of sockets in the machine that may connect to its host's loopback; up to 6 needs no rights

MAX_LINE = 16 << 20  # bytes of one message; a plan holds the environment


class ProtocolError(Exception):
    """A message is not what it should be."""


class Message(Struct):
    """Base of the structs below: plain JSON both ways."""

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, message: object) -> Self:
        """The object that ``to_json`` gave; keys that are not known are ignored, missing ones have their default.

        Raises:
            ProtocolError: a value is missing or has the wrong type.
        """
        if not isinstance(message, dict):
            raise ProtocolError(f"{cls.__name__} is not an object")
        import typing  # only who receives needs it: the agent

        hints = typing.get_type_hints(cls, localns={"Literal": typing.Literal})
        values = {name: _load(hints[name], message[name], name) for name in fields(cls) if name in message}
        try:
            return cls(**values)
        except TypeError as error:
            raise ProtocolError(f"{cls.__name__} is incomplete: {error}") from error


def _load(kind: Any, value: object, name: str) -> Any:
    """``value`` as the type ``kind``, for the few kinds that are used below."""
    from typing import Literal, get_args, get_origin

    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType:
        inner = next(arg for arg in args if arg is not type(None))
        return None if value is None else _load(inner, value, name)
    if origin is Literal:
        if value in args:
            return value
    elif origin is list:
        if isinstance(value, list):
            return [_load(args[0], item, name) for item in value]
    elif origin is dict:
        if isinstance(value, dict):
            return {_load(args[0], key, name): _load(args[1], item, name) for key, item in value.items()}
    elif isinstance(kind, type) and issubclass(kind, Message):
        return kind.from_json(value)
    elif kind is float and isinstance(value, int | float):
        return float(value)
    elif isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise ProtocolError(f"{name} is wrong: {value!r}")


class HealthPlan(Message):
    """How the container's health is found.

    Attributes:
        kind: ``ready``: it runs; ``image``: what the image's HEALTHCHECK says, or ``ready`` without one; ``http``: GET of
            ``url`` in the guest answers with a status below 400.
        interval, timeout, start_period: seconds; None for the image's, or Podman's default.
        retries: failures in a row that make it unhealthy.
    """

    kind: Literal["ready", "image", "http"] = "ready"
    url: str | None = None
    interval: float | None = None
    timeout: float | None = None
    retries: int | None = None
    start_period: float | None = None


class ContainerPlan(Message):
    """The container to run: the options of `podman run`.

    Attributes:
        image: id (``sha256:...``) or name in the image disk's store.
        entrypoint, command: None for the image's own.
        privileged: all capabilities and devices.
        stop_signal: None for the image's, or SIGTERM.
        stop_timeout: seconds from the stop signal to SIGKILL.
        rows, columns: the terminal's first size, with ``tty``.
    """

    image: str
    name: str = "container"
    entrypoint: list[str] | None = None
    command: list[str] | None = None
    env: dict[str, str] = field(default_factory=dict)
    user: str | None = None
    workdir: str | None = None
    privileged: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    tty: bool = False
    stdin: bool = False
    stop_signal: str | None = None
    stop_timeout: float = 10.0
    hostname: str | None = None
    health: HealthPlan = field(default_factory=HealthPlan)
    rows: int = 24
    columns: int = 80


class NetworkPlan(Message):
    """What ``eth0`` gets; the same in every VM but for names and MTU. Addresses have their prefix length.

    Attributes:
        gateway6: None: the host has no IPv6 route.
        hosts: further names for /etc/hosts with their addresses.
    """

    address: str
    gateway: str
    dns: list[str] = field(default_factory=list)
    search: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    hosts: dict[str, str] = field(default_factory=dict)
    address6: str | None = None
    gateway6: str | None = None
    mac: str | None = None
    mtu: int = 1500


class VolumePlan(Message):
    """A host directory or file: served by the host on ``port`` (FUSE over vsock), seen in the container at ``path``."""

    port: int
    path: str
    read_only: bool = False
    file: bool = False


class Identity(Message):
    """Who a VM is. A restored guest takes it before it does anything else.

    Attributes:
        machine_id: 32 hexadecimal digits, for /etc/machine-id.
        entropy: random bytes of the host, base64; see ``seed``.
        wall_clock_ns: the host's CLOCK_REALTIME when the message was sent; 0 to leave the guest's clock alone.
        network: a network that differs from the snapshot's; None: only its caches are stale.
        drop_sessions: kill exec sessions: their clients belong to the VM that the snapshot was taken of.
    """

    hostname: str
    machine_id: str
    entropy: str = ""
    wall_clock_ns: int = 0
    network: NetworkPlan | None = None
    drop_sessions: bool = False

    @property
    def seed(self) -> bytes:
        """The entropy as bytes."""
        return base64.b64decode(self.entropy)


class Plan(Message):
    """What a VM that was just booted shall do. Without a container the agent only takes its identity and says ready.

    Attributes:
        nested: VMs shall run in it; it has the disk for that.
    """

    identity: Identity
    container: ContainerPlan | None = None
    network: NetworkPlan | None = None
    volumes: list[VolumePlan] = field(default_factory=list)
    nested: bool = False
