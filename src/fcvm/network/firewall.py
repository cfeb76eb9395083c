"""Beside other firewalls: forwarded packets must pass their FORWARD chains too.

An ``accept`` in a chain of ours ends nothing: a packet is dropped if *any* chain on the hook drops it, and Docker sets the
policy of ``FORWARD`` to drop, firewalld rejects what it does not know. So where a foreign chain drops what nobody asked for,
two rules are put in front: from and to interfaces named ``fcvm*``. Docker provides a chain for this, ``DOCKER-USER``, which
is used where it exists. What a VM may be reached by is decided in its own namespace.

They are the same two rules for all VMs and carry the comment ``fcvm``. The last VM takes them away, or, if it was killed, the
next command (``sweep``).
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fcvm import log, process
from fcvm.config import default_runtime_dir
from fcvm.errors import FcvmError, NetworkError
from fcvm.linux import netlink, nft, rtnetlink
from fcvm.linux.netlink import NetlinkError
from fcvm.linux.nft import Chain
from fcvm.network.loop import READ, Loop
from fcvm.network.subnets import POOLS, PREFIX
from fcvm.storage.layout import locked

COMMENT = "fcvm"
ENDING = "fcvm: ending"
DOCKER_USER = "DOCKER-USER"
INTERFACES = f"{PREFIX}*"
# the kernel's older, "legacy" tables: the program, and where it is seen that they are in use
LEGACY = {nft.IPV4: ("iptables-legacy", "ip_tables_names"), nft.IPV6: ("ip6tables-legacy", "ip6_tables_names")}
XTABLES_LOCK = "/run/xtables.lock"
_LOCKED = 4  # RESOURCE_PROBLEM of <xtables.h>
_PATIENCE = 5  # seconds; a change takes milliseconds, a large restore some seconds
# what a rule consists of that matches everything and ends badly
_UNCONDITIONAL = {"counter", "log", "limit", "immediate", "reject"}
_EVENT = 1 << 16  # bytes
_QUIET = 0.3  # seconds from a change to a look: changes come in numbers


def open_up(families: tuple[int, ...] = (nft.IPV4,)) -> list[str]:
    """Put our rules before every foreign chain that would drop VMs' packets; returns where they were added.

    The interface must exist before this is called, or a VM that ends now may take the rules away.

    Raises:
        NetworkError: a chain that drops cannot be changed.
    """
    added = []
    with nft.open_socket() as sock:
        for family in families:
            hooked, legacy = _hooked(sock, family)
            if hooked or legacy:
                with _lock():
                    for base in hooked:
                        if _drops(sock, base):
                            added += _insert(sock, _place(sock, base))
                    if legacy:
                        added += _insert_legacy(LEGACY[family][0])
    return added


def keep_open(loop: Loop, families: tuple[int, ...]) -> None:
    """Do the same again whenever other tables change: Docker starts, firewalld is reloaded."""
    sock = nft.subscribe(nft.open_socket(), but=f"{PREFIX}-".encode())
    waiting = False

    def again() -> None:
        nonlocal waiting
        waiting = False
        try:
            open_up(families)
        except (FcvmError, OSError) as error:
            log.warning(f"The firewall of this host has changed, and VMs may be cut off: {error}")

    def changed(_: int) -> None:
        nonlocal waiting
        with suppress(OSError):  # ENOBUFS: more has changed than could be told
            sock.recv(_EVENT)
        if not waiting:
            waiting = True
            loop.after(_QUIET, again)

    loop.own(sock)
    loop.call(lambda: loop.watch(sock, READ, changed))


def ending(route: netlink.Socket, index: int) -> None:
    """Note on a VM's interface that it is going: the kernel takes its time to remove it. Then ``sweep``."""
    with suppress(NetlinkError):
        route.request([rtnetlink.set_alias(index, ENDING)])
    sweep()


def sweep() -> None:
    """Take our rules away if no VM is there; quietly, whatever is in the way."""
    with suppress(OSError, FcvmError), nft.open_socket() as sock:
        for family in (nft.IPV4, nft.IPV6):
            hooked, legacy = _hooked(sock, family)
            if hooked or legacy:
                with _lock():
                    if _vms():
                        return
                    for rule in [rule for base in hooked for rule in _ours(sock, _place(sock, base))]:
                        batch = nft.Batch(rule.family)
                        batch.delete_rule(rule)
                        batch.commit(sock)
                    if legacy:
                        _remove_legacy(LEGACY[family][0])


def _vms() -> bool:
    with rtnetlink.open_socket() as route:
        return any(link.name.startswith(PREFIX) and link.alias != ENDING for link in rtnetlink.links(route))


@contextmanager
def _lock() -> Iterator[None]:
    with locked(os.path.join(default_runtime_dir(), "firewall.lock")):
        yield


def _hooked(sock: netlink.Socket, family: int) -> tuple[list[Chain], bool]:
    """The foreign filter chains on the forward hook of a family, and whether legacy iptables filters there too."""
    listed = nft.chains(sock, leave_out=f"{PREFIX}-")
    found = [c for c in listed if c.hook == nft.FORWARD and c.type == "filter" and c.family in (family, nft.INET)]
    try:
        legacy = "filter" in Path(f"/proc/thread-self/net/{LEGACY[family][1]}").read_text().split()
    except OSError:
        legacy = False
    return found, legacy


def _drops(sock: netlink.Socket, base: Chain) -> bool:
    """Whether a chain drops what none of its rules accepts."""
    if base.policy == nft.DROP:
        return True
    last = nft.rules(sock, base.family, base.table, base.name)[-1:]
    return bool(last) and set(last[0].expressions) <= _UNCONDITIONAL and last[0].refuses


def _place(sock: netlink.Socket, base: Chain) -> Chain:
    """The chain at whose head our rules belong."""
    return nft.chain(sock, base.family, base.table, DOCKER_USER) or base


def _ours(sock: netlink.Socket, chain: Chain) -> list[nft.Rule]:
    return [r for r in nft.rules(sock, chain.family, chain.table, chain.name) if r.comment == COMMENT]


def _insert(sock: netlink.Socket, chain: Chain) -> list[str]:
    if _ours(sock, chain):
        return []
    batch = nft.Batch(chain.family)
    for match in (nft.oifname(INTERFACES), nft.iifname(INTERFACES)):
        expressions = (match, nft.counter(), nft.verdict(nft.ACCEPT))
        batch.rule(chain.table, chain.name, *expressions, first=True, comment=COMMENT)
    where = f"{chain.table} {chain.name}"
    try:
        batch.commit(sock)
    except NetlinkError as error:
        if error.errno == errno.EPERM and chain.table == "firewalld":  # firewalld 2 owns its table
            return _trust_firewalld()
        raise NetworkError(
            f"The firewall chain {where} drops what VMs send, and cannot be changed: {error.strerror}.",
            hint=f'allow forwarding from and to interfaces named "{INTERFACES}" there, or use --network rootless',
        ) from error
    log.info(f"Added rules for {INTERFACES} to the firewall chain {where}.")
    return [where]


def _trust_firewalld() -> list[str]:
    """firewalld has a zone whose networks may do everything, until it is reloaded."""
    for pool in POOLS:
        process.run(["firewall-cmd", "--quiet", "--zone=trusted", f"--add-source={pool}"])
    return ["firewalld trusted"]


def _legacy_rules() -> list[list[str]]:
    comment = ["-m", "comment", "--comment", COMMENT, "-j", "ACCEPT"]
    return [[way, f"{PREFIX}+", *comment] for way in ("-i", "-o")]


def _insert_legacy(program: str) -> list[str]:
    listed = _legacy(program, "-S", "FORWARD")
    if listed is None or "-P FORWARD DROP" not in listed:
        return []
    chain = DOCKER_USER if f"-j {DOCKER_USER}" in listed else "FORWARD"
    missing = [rule for rule in _legacy_rules() if _legacy(program, "-C", chain, *rule) is None]
    for rule in missing:
        _legacy(program, "-I", chain, *rule, check=True)
    return [f"{program} {chain}"] if missing else []


def _remove_legacy(program: str) -> None:
    for chain in (DOCKER_USER, "FORWARD"):
        for rule in _legacy_rules():
            while _legacy(program, "-D", chain, *rule) is not None:
                pass


def _legacy(program: str, *arguments: str, check: bool = False) -> str | None:
    """What the program prints; None if it fails.

    Raises:
        ProcessError: it fails, and ``check`` is set.
        NetworkError: somebody else has the tables, and keeps them.
    """
    done = process.run([program, "-w", str(_PATIENCE), *arguments], check=False)
    if done.returncode == _LOCKED:
        raise NetworkError(
            f"Another program has held the lock of {program}'s tables, {XTABLES_LOCK}, for {_PATIENCE} seconds.",
            hint=f"fuser -v {XTABLES_LOCK} says which; or use --network rootless",
        )
    if check and done.returncode != 0:
        raise process.failure(done.args, done.returncode, done.stderr)
    return done.stdout.decode() if done.returncode == 0 else None
