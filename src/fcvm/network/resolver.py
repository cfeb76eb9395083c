"""The host's resolvers and search domains: ``resolv.conf(5)``, and who to ask now.

The forwarder asks from the host, so whatever is written there works: systemd-resolved's stub at 127.0.0.53, with the
per-link servers and split domains of a VPN that it knows of, dnsmasq on the loopback, a link-local IPv6 server.
"""

import os
from pathlib import Path

from fc_agent.structs import Struct
from fcvm.network.relay import Target, target

RESOLV_CONF = Path("/etc/resolv.conf")
PORT = 53


class Resolver(Struct):
    """``nameserver``, ``search`` and ``options`` of a resolv.conf."""

    servers: tuple[str, ...]
    search: tuple[str, ...]
    options: tuple[str, ...]


def read(path: Path = RESOLV_CONF) -> Resolver:
    """What ``path`` says; without any nameserver (or file) the local machine is asked, as resolv.conf(5) has it."""
    servers: list[str] = []
    search: tuple[str, ...] = ()
    options: list[str] = []
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        words = line.split("#")[0].split(";")[0].split()
        match words:
            case ["nameserver", address, *_]:
                servers.append(address)
            case ["search" | "domain", *domains]:  # the last one counts
                search = tuple(domain for domain in domains if domain != ".")
            case ["options", *more]:
                options += more
    return Resolver(tuple(servers) or ("127.0.0.1",), search, tuple(dict.fromkeys(options)))


class Upstreams:
    """The servers to ask, looked up again when the file changes (a VPN comes up, a laptop moves)."""

    def __init__(self, fixed: tuple[str, ...] = (), path: Path = RESOLV_CONF) -> None:
        self._fixed = fixed
        self._path = path
        self._stamp: object = None
        self._targets: list[Target] = []

    def __call__(self) -> list[Target]:
        """Targets in the order to be tried."""
        stamp = self._look()
        if stamp != self._stamp or not self._targets:
            servers = self._fixed or read(self._path).servers
            self._targets = [found for server in servers if (found := _target(server)) is not None]
            self._stamp = stamp
        return list(self._targets)

    def _look(self) -> object:
        if self._fixed:
            return self._fixed
        try:
            stat = os.stat(self._path)
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _target(server: str) -> Target | None:
    try:
        return target(server, PORT)
    except OSError:
        return None
