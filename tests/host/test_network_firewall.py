"""Bridged networks beside other firewalls, on a host (a namespace) whose FORWARD chains really drop."""

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from network_world import HOST_IP, LAN_IP, TIMEOUT, FakeGuest, World, needs_root

from fcvm import process
from fcvm.errors import NetworkError
from fcvm.linux import nft
from fcvm.network import firewall, host, spec
from fcvm.network.attach import Network

pytestmark = needs_root

# as Docker leaves it
DOCKER = """
iptables -P FORWARD DROP
iptables -N DOCKER-USER
iptables -A DOCKER-USER -j RETURN
iptables -N DOCKER-FORWARD
iptables -A FORWARD -j DOCKER-USER
iptables -A FORWARD -j DOCKER-FORWARD
iptables -A DOCKER-FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
"""
# as firewalld 1 leaves it: the policy accepts, the last rule rejects
FIREWALLD = """
nft -f - <<END
table inet firewalld {
    chain filter_FORWARD {
        type filter hook forward priority filter + 10; policy accept;
        ct state { established, related } accept
        ct status dnat accept
        iifname "lo" accept
        ct state invalid drop
        reject with icmpx type admin-prohibited
    }
}
END
"""
# a chain that is strict with somebody else
HARMLESS = """
nft -f - <<END
table ip other {
    chain forward {
        type filter hook forward priority filter; policy accept;
        oifname "virbr0" drop
    }
}
END
"""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def start(world: World, vm_id: str = "vm1") -> tuple[Network, FakeGuest]:
    network = world.network(spec.parse("bridged", ["80"]), vm_id)
    return network, world.guest(network)


def works(world: World, network: Network, guest: FakeGuest) -> None:
    server = world.server(guest, "guest", "0.0.0.0", 80)
    lan = world.server(world.lan, "lan", LAN_IP)
    port = network.describe()["ports"][0]["host_port"]
    assert guest.ask(LAN_IP, lan.port).startswith(b"lan ")
    assert world.lan.ask(HOST_IP, port).startswith(b"guest ")
    assert world.host.ask("127.0.0.1", port).startswith(b"guest ")
    server.close()
    lan.close()


def ruleset(world: World) -> str:
    return world.host.shell("nft -s list ruleset")


@pytest.mark.parametrize(
    ("rules", "where"),
    [
        (DOCKER, "filter DOCKER-USER"),
        ("iptables -P FORWARD DROP", "filter FORWARD"),
        ("iptables -A FORWARD -j REJECT", None),  # a rule of iptables' own kind: see below
        (FIREWALLD, "firewalld filter_FORWARD"),
        (DOCKER + FIREWALLD, "filter DOCKER-USER"),
    ],
    ids=["docker", "policy", "reject", "firewalld", "both"],
)
def test_beside_a_firewall_that_drops(world: World, rules: str, where: str | None) -> None:
    world.host.shell(rules)
    before = ruleset(world)
    network, guest = start(world)
    works(world, network, guest)
    if where:
        assert where in network.describe()["changed"]
    if "iptables" in rules:  # and iptables still understands its table
        listed = world.host.shell("iptables -S")
        assert "-i fcvm+" in listed
        assert "-o fcvm+" in listed
    second, other = start(world, "vm2")
    works(world, second, other)
    assert where not in second.describe()["changed"]
    world.host.run(network.close)
    works(world, second, other)
    world.host.run(second.close)
    assert ruleset(world) == before


@pytest.mark.skipif(shutil.which("iptables-legacy", path="/usr/sbin:/sbin") is None, reason="no iptables-legacy")
def test_beside_the_older_iptables(world: World) -> None:
    rules = DOCKER.replace("iptables", "iptables-legacy")
    world.host.shell(rules)
    before = world.host.shell("iptables-legacy -S")
    network, guest = start(world)
    works(world, network, guest)
    assert "-i fcvm+" in world.host.shell("iptables-legacy -S DOCKER-USER")
    start(world, "vm2")
    assert world.host.shell("iptables-legacy -S").count("-i fcvm+") == 1
    world.host.run(network.close)
    assert "-i fcvm+" in world.host.shell("iptables-legacy -S DOCKER-USER")
    world.close()
    assert "fcvm" not in before


@pytest.mark.skipif(shutil.which("iptables-legacy", path="/usr/sbin:/sbin") is None, reason="no iptables-legacy")
def test_somebody_keeps_the_lock_of_the_older_iptables(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = DOCKER.replace("iptables", "iptables-legacy")
    world.host.shell(rules)
    monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
    monkeypatch.setattr(process, "KEEP_ENVIRONMENT", (*process.KEEP_ENVIRONMENT, "XTABLES_LOCKFILE"))
    monkeypatch.setattr(firewall, "_PATIENCE", 1)
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(NetworkError, match="has held the lock of iptables-legacy's tables"):
            start(world)
        assert "fcvm" not in world.host.shell("XTABLES_LOCKFILE=/dev/null iptables-legacy -S")
    network, guest = start(world, "vm2")
    works(world, network, guest)


def test_a_chain_that_drops_others_is_left_alone(world: World) -> None:
    world.host.shell(HARMLESS)
    before = ruleset(world)
    network, guest = start(world)
    works(world, network, guest)
    assert "fcvm*" not in world.host.shell("nft list table ip other")
    world.host.run(network.close)
    assert ruleset(world) == before


def test_rules_of_a_killed_vm_are_swept_when_no_vm_is_left(world: World) -> None:
    world.host.shell(DOCKER)
    before = ruleset(world)
    # what a kill leaves: the rules without any interface
    world.host.run(firewall.open_up)
    assert ruleset(world) != before
    network, _ = start(world)
    world.host.run(firewall.sweep)
    assert "fcvm*" in world.host.shell("nft list chain ip filter DOCKER-USER")
    world.host.run(network.close)
    assert ruleset(world) == before
    world.host.run(firewall.open_up)
    world.host.run(firewall.sweep)
    assert ruleset(world) == before


def test_docker_starts_later(world: World) -> None:
    network, guest = start(world)
    works(world, network, guest)
    before = ruleset(world)
    world.host.shell(DOCKER)
    lan = world.server(world.lan, "lan", LAN_IP)
    end = time.monotonic() + TIMEOUT
    while not guest.reachable(LAN_IP, lan.port, wait=0.5):
        assert time.monotonic() < end
    works(world, network, guest)
    world.host.run(network.close)
    assert "fcvm" not in ruleset(world)
    assert "fcvm*" not in before.replace('oifname != "fcvm*"', "")


def test_somebody_elses_own_table(world: World) -> None:
    def own() -> object:
        sock = nft.open_socket()
        batch = nft.Batch()
        batch.table("strict", owner=True)
        batch.chain("strict", "forward", type="filter", hook=nft.FORWARD, priority=0, policy=nft.DROP)
        batch.commit(sock)
        return sock

    with closing(world.host.run(own)):
        interfaces = world.host.interfaces()
        with pytest.raises(NetworkError, match="strict forward drops") as caught:
            start(world)
        assert caught.value.hint
        assert world.host.tables() == {"strict"}
        while world.host.interfaces() != interfaces:  # the kernel takes the namespace apart in its own time
            pass


def test_flushing_the_ruleset_does_not_cut_vms_off(world: World) -> None:
    network, guest = start(world)
    world.host.shell("nft flush ruleset")
    works(world, network, guest)


def test_forwarding_is_turned_on_only_where_it_is_needed(world: World) -> None:
    world.host.shell("ip link add unused type veth; ip link set unused up")

    def sysctls() -> dict[str, str]:
        return {name: (host.CONF4 / name / "forwarding").read_text().strip() for name in os.listdir(host.CONF4)}

    before = world.host.run(sysctls)
    assert before["eth0"] == "0"
    network, _ = start(world)
    assert network.describe()["changed"] == ["net.ipv4.conf.eth0.forwarding=1"]
    after = world.host.run(sysctls)
    interface = network.describe()["interface"]
    assert {name for name, value in after.items() if value == "1"} == {"eth0", interface}
    second, _ = start(world, "vm2")
    assert second.describe()["changed"] == []


def test_subnets_avoid_the_hosts_routes(world: World) -> None:
    first, _ = start(world)
    assert first.describe()["host_ip"].startswith("172.30.")
    world.host.shell("ip route add 172.30.0.0/16 via 192.0.2.1")
    second, guest = start(world, "vm2")
    assert second.describe()["host_ip"].startswith("198.18.")
    works(world, second, guest)
    # a route of a VPN's own table counts too
    world.host.shell("ip route add 198.18.0.0/15 via 192.0.2.1 table 52; ip rule add lookup 52 priority 100")
    interfaces = world.host.interfaces()
    with pytest.raises(NetworkError, match="No subnet is left"):
        start(world, "vm3")
    assert world.host.interfaces() == interfaces


def test_250_vms(world: World) -> None:
    networks = [world.network(spec.parse("bridged", ["80"]), f"vm{number}") for number in range(250)]
    described = [network.describe() for network in networks]
    assert len({d["interface"] for d in described}) == 250
    assert len({d["host_ip"] for d in described}) == 250
    assert len({d["ports"][0]["host_port"] for d in described}) == 250
    for network in (networks[0], networks[-1]):
        guest = world.guest(network)
        works(world, network, guest)


def test_the_same_subnet_is_not_taken_twice_in_a_race(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    # both want the same one: the first look says that it is free
    monkeypatch.setattr("zlib.crc32", lambda _: 7)
    monkeypatch.setattr("fcvm.network.subnets._routed", lambda *_: None)
    first, _ = start(world)
    second, guest = start(world, "vm2")
    assert first.describe()["interface"] == "fcvm7"
    assert second.describe()["interface"] == "fcvm8"
    works(world, second, guest)


def test_a_udp_client_that_goes_on_through_a_restart(world: World) -> None:
    """Its packets keep the kernel's memory of the old VM alive, which must not swallow them."""
    with world.lan.make_socket(socket.SOCK_DGRAM) as client:
        client.connect((HOST_IP, 5353))
        for vm_id in ("vm1", "vm2"):
            network = world.network(spec.parse("bridged", ["5353:53/udp"]), vm_id)
            guest = world.guest(network)
            server = world.server(guest, vm_id, "0.0.0.0", 53, kind=socket.SOCK_DGRAM)
            assert world.lan.exchange(client, b"hello").startswith(vm_id.encode())
            server.close()
            world.host.run(network.close)
            with pytest.raises(OSError, match="refused"):  # at once: nobody is there
                world.lan.exchange(client, b"nobody", attempts=1)
