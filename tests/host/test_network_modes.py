"""What is true of a network in both modes, with real traffic between namespaces: host, another host, guest."""

import queue
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from network_world import HOST_IP, LAN_IP, LAN_IP6, TIMEOUT, FakeGuest, World, needs_root, question

from fcvm.errors import ConflictError, NetworkError
from fcvm.network import attach, refusals, spec
from fcvm.network.attach import Network
from fcvm.network.publish import parse
from fcvm.network.slirp import Slirp

pytestmark = needs_root
GATEWAY, RESOLVER = "10.0.2.2", "10.0.2.3"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path, ipv6=True)
    yield made
    made.close()


@pytest.fixture(params=["bridged", "rootless"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Start = Callable[..., tuple[Network, FakeGuest]]


@pytest.fixture
def start(world: World, mode: str) -> Start:
    """Start a network of this mode with a guest behind it."""

    def begin(publish: str = "", forward: str = "", dns: str = "", vm_id: str = "vm1") -> tuple[Network, FakeGuest]:
        texts = ([text] if text else [] for text in (publish, forward, dns))
        network = world.network(spec.parse(mode, *texts), vm_id)
        return network, world.guest(network)

    return begin


def port_of(network: Network, index: int = 0) -> int:
    number = network.describe()["ports"][index]["host_port"]
    assert isinstance(number, int)
    assert number > 0
    return number


def test_the_guest_reaches_other_hosts_as_the_host(world: World, start: Start) -> None:
    _, guest = start()
    tcp = world.server(world.lan, "lan", LAN_IP)
    udp = world.server(world.lan, "lan", LAN_IP, kind=socket.SOCK_DGRAM)
    assert guest.ask(LAN_IP, tcp.port) == b"lan %s hello" % HOST_IP.encode()
    assert guest.ask_udp(LAN_IP, udp.port) == b"lan %s hello" % HOST_IP.encode()


def test_the_guest_reaches_ipv6(world: World, start: Start) -> None:
    network, guest = start()
    assert network.guest.gateway6 == "fd66:6376:6d00::2"
    server = world.server(world.lan, "lan", LAN_IP6)
    assert guest.ask(LAN_IP6, server.port) == b"lan 2001:db8::2 hello"


def test_a_lot_of_data_in_both_directions(world: World, start: Start) -> None:
    network, guest = start("80")
    data = bytes(range(256)) * (16 << 10)  # 4 MiB
    outside = world.server(world.lan, "lan", LAN_IP)
    inside = world.server(guest, "guest", "0.0.0.0", 80)
    assert guest.ask(LAN_IP, outside.port, data).endswith(data)
    assert world.lan.ask(HOST_IP, port_of(network), data).endswith(data)
    assert inside.port == 80


@pytest.mark.parametrize("to", ["127.0.0.1", "::1", HOST_IP, "2001:db8::2"])
def test_a_published_port_from_the_host(world: World, start: Start, to: str) -> None:
    network, guest = start("80,53/udp")
    world.server(guest, "tcp", "0.0.0.0", 80)
    world.server(guest, "udp", "0.0.0.0", 53, kind=socket.SOCK_DGRAM)
    assert world.host.ask(to, port_of(network)).endswith(b" hello")
    assert world.host.ask_udp(to, port_of(network, 1)).startswith(b"udp ")


@pytest.mark.parametrize("to", [HOST_IP, "2001:db8::2"])
def test_a_published_port_from_another_host(world: World, start: Start, to: str) -> None:
    network, guest = start("80,53/udp")
    world.server(guest, "tcp", "0.0.0.0", 80)
    world.server(guest, "udp", "0.0.0.0", 53, kind=socket.SOCK_DGRAM)
    assert world.lan.ask(to, port_of(network)).endswith(b" hello")
    assert world.lan.ask_udp(to, port_of(network, 1)).startswith(b"udp ")


def test_udp_clients_of_all_kinds_at_once(world: World, start: Start) -> None:
    network, guest = start("53/udp")
    world.server(guest, "udp", "0.0.0.0", 53, kind=socket.SOCK_DGRAM)
    port = port_of(network)
    for _ in range(2):
        for place, ip in ((world.lan, HOST_IP), (world.host, "127.0.0.1"), (world.host, "::1"), (world.host, HOST_IP)):
            assert place.ask_udp(ip, port).startswith(b"udp ")


def test_the_guest_sees_who_connects(world: World, start: Start) -> None:
    network, guest = start("80")
    world.server(guest, "guest", "0.0.0.0", 80)
    assert world.lan.ask(HOST_IP, port_of(network)) == b"guest %s hello" % LAN_IP.encode()


def test_a_port_of_one_address_is_not_to_be_had_at_others(world: World, start: Start) -> None:
    network, guest = start(f"127.0.0.1::80,[::1]::81,{HOST_IP}::82")
    for port in (80, 81, 82):
        world.server(guest, str(port), "0.0.0.0", port)
    local, local6, lan = (port_of(network, index) for index in range(3))
    assert world.host.ask("127.0.0.1", local).startswith(b"80 ")
    assert world.host.ask("::1", local6).startswith(b"81 ")
    assert world.lan.ask(HOST_IP, lan).startswith(b"82 ")
    assert world.host.ask(HOST_IP, lan).startswith(b"82 ")
    assert not world.lan.reachable(HOST_IP, local)
    assert not world.lan.reachable("2001:db8::2", local6)
    assert not world.host.reachable("127.0.0.1", lan)


def test_a_range(world: World, start: Start) -> None:
    network, guest = start("8000-8004:9000-9004")
    for port in range(9000, 9005):
        world.server(guest, str(port), "0.0.0.0", port)
    for index, port in enumerate(range(8000, 8005)):
        assert port_of(network, index) == port
        assert world.host.ask("127.0.0.1", port).startswith(b"%d " % (port + 1000))


def test_a_closed_port_of_the_guest_is_refused(world: World, start: Start) -> None:
    network, _ = start("80")
    with pytest.raises(OSError, match=r"refused|reset|not connected|Broken pipe"):
        world.host.ask("127.0.0.1", port_of(network))


def test_a_port_that_refuses_and_then_answers_is_noticed(
    world: World, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "SETTLE", 0.05)
    monkeypatch.setattr(refusals, "PAUSE", 0.05)
    network, guest = start("80,81,53/udp")
    refused: queue.Queue[frozenset[int]] = queue.Queue()
    answered: queue.Queue[frozenset[int]] = queue.Queue()
    network.on_refused, network.on_answered = refused.put, answered.put
    server = world.server(guest, "guest", "127.0.0.1", 80)
    world.server(guest, "guest", "0.0.0.0", 81)
    assert world.host.ask("127.0.0.1", port_of(network, 1)).startswith(b"guest ")
    with pytest.raises(OSError, match=r"refused|reset|not connected|Broken pipe"):
        world.host.ask("127.0.0.1", port_of(network))
    assert refused.get(timeout=20) == {80}
    assert answered.empty()
    server.close()
    world.server(guest, "guest", "0.0.0.0", 80)
    for port in (1, 0, 0):
        assert world.host.ask("127.0.0.1", port_of(network, port)).startswith(b"guest ")
    assert answered.get(timeout=20) == {80}
    assert not guest.reachable(LAN_IP, 9)  # refused as well, but by another host
    assert refused.empty()
    assert answered.empty()


def test_the_guest_reaches_itself_through_its_port(world: World, start: Start) -> None:
    network, guest = start("80")
    world.server(guest, "guest", "0.0.0.0", 80)
    assert guest.ask(HOST_IP, port_of(network)).startswith(b"guest ")


def test_the_gateway_stands_for_the_host(world: World, start: Start) -> None:
    _, guest = start()
    server = world.server(world.host, "host", "0.0.0.0")
    udp = world.server(world.host, "host", HOST_IP, kind=socket.SOCK_DGRAM)
    assert guest.ask(GATEWAY, server.port).startswith(b"host ")
    assert guest.ask_udp(HOST_IP, udp.port).startswith(b"host ")


def test_the_hosts_loopback_is_closed_except_where_asked(world: World, start: Start) -> None:
    secret = world.server(world.host, "secret", "127.0.0.1")
    secret6 = world.server(world.host, "secret", "::1")
    open_ = world.server(world.host, "open", "127.0.0.1")
    open6 = world.server(world.host, "open6", "::1")
    udp = world.server(world.host, "udp", "127.0.0.1", kind=socket.SOCK_DGRAM)
    network, guest = start(forward=f"{open_.port},{open6.port},{udp.port}/udp")
    assert guest.ask(GATEWAY, open_.port) == b"open 127.0.0.1 hello"
    assert guest.ask(GATEWAY, open6.port) == b"open6 ::1 hello"
    assert guest.ask_udp(GATEWAY, udp.port) == b"udp 127.0.0.1 hello"
    uplink = network.describe()["host_ip"] or "172.30.255.100"
    head = uplink.rpartition(".")[0]
    neighbours = [f"{head}.{last}" for last in (1, 2, 3)] + [f"{head}.{int(uplink.split('.')[3]) - 1}"]
    for ip in (GATEWAY, RESOLVER, HOST_IP, "127.0.0.1", "127.0.0.2", *neighbours):
        assert not guest.reachable(ip, secret.port, wait=0.3), ip
    for ip in ("::1", "fd00::2", "fd00::3", "2001:db8::2", "fd66:6376:6d00::2"):
        assert not guest.reachable(ip, secret6.port, wait=0.3), ip
    assert not world.lan.reachable(HOST_IP, open_.port)


@pytest.mark.parametrize(
    ("to", "loopback"), [("::ffff:127.0.0.1", "127.0.0.1"), ("::127.0.0.1", "127.0.0.1"), ("::", "::1"), ("::1", "::1")]
)
def test_the_hosts_loopback_has_no_other_name(world: World, start: Start, to: str, loopback: str) -> None:
    """A socket of the host that sends to an IPv4 address inside an IPv6 one sends to the IPv4 address; only raw packets of
    a guest have it as their destination.
    """
    _, guest = start()
    heard = world.host.make_socket(socket.SOCK_DGRAM, socket.AF_INET6 if ":" in loopback else socket.AF_INET)
    known = world.host.make_socket(socket.SOCK_DGRAM, socket.AF_INET6)
    with heard, known:
        heard.bind((loopback, 0))
        known.bind(("2001:db8::2", 0))
        for ip, port in ((to, heard.getsockname()[1]), ("2001:db8::2", known.getsockname()[1])):
            guest.run(lambda ip=ip, port=port: send_udp6(ip, port))
        assert known.recv(100) == b"datagram"  # what is sent so arrives where it may
        heard.settimeout(1)
        with pytest.raises(TimeoutError):
            heard.recv(100)


def send_udp6(to: str, port: int) -> None:
    """Send a datagram from the guest that its own kernel would not."""
    source, destination = ip_address("fd66:6376:6d00::100").packed, ip_address(to).packed
    data = b"datagram"
    length = 8 + len(data)
    pseudo = source + destination + struct.pack(">IxxxB", length, socket.IPPROTO_UDP)
    header = struct.pack(">HHH", 5555, port, length)
    total = sum(struct.unpack(f">{(len(pseudo) + 8 + len(data)) // 2}H", pseudo + header + b"\0\0" + data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    packet = struct.pack(">IHBB", 6 << 28, length, socket.IPPROTO_UDP, 64) + source + destination
    macs = bytes.fromhex("aafc00000002" "aafc00000064")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", 0))
        raw.send(macs + b"\x86\xdd" + packet + header + struct.pack(">H", total ^ 0xFFFF) + data)


def test_dns_by_the_hosts_stub(world: World, start: Start) -> None:
    world.dns(world.host, "127.0.0.53")
    world.dns(world.host, "127.0.0.53", kind=socket.SOCK_STREAM)
    network, guest = start(dns="127.0.0.53")
    assert network.guest.dns == (RESOLVER,)
    assert bytes([203, 0, 113, 7]) in guest.ask_udp(RESOLVER, 53, question("example.com"))
    assert bytes([203, 0, 113, 7]) in guest.ask(RESOLVER, 53, question("example.com"))


def test_dns_by_the_second_server_of_another_host(world: World, start: Start) -> None:
    world.dns(world.lan, LAN_IP)
    _, guest = start(dns=f"127.0.0.1,{LAN_IP}")
    assert bytes([203, 0, 113, 7]) in guest.ask_udp(RESOLVER, 53, question("example.com"))


def test_many_vms_with_the_same_guest_port(world: World, start: Start) -> None:
    networks = [start("80", vm_id=f"vm{number}") for number in range(5)]
    for number, (_, guest) in enumerate(networks):
        world.server(guest, f"guest{number}", "0.0.0.0", 80)
    for number, (network, _) in enumerate(networks):
        assert world.lan.ask(HOST_IP, port_of(network)).startswith(b"guest%d " % number)
        assert world.host.ask("127.0.0.1", port_of(network)).startswith(b"guest%d " % number)


def test_vms_reach_each_other_by_published_ports_only(world: World, start: Start) -> None:
    network, guest = start("127.0.0.1::80,81", vm_id="vm1")
    _, other = start(vm_id="vm2")
    for port in (80, 81, 82):
        world.server(guest, str(port), "0.0.0.0", port)
    assert other.ask(HOST_IP, port_of(network, 1)).startswith(b"81 ")
    assert other.ask(GATEWAY, port_of(network, 1)).startswith(b"81 ")
    assert not other.reachable(HOST_IP, port_of(network, 0), wait=0.3)
    assert not other.reachable(GATEWAY, port_of(network, 0), wait=0.3)
    where = network.describe()["host_ip"]
    if where is not None:
        for port in (80, 82):
            assert world.host.reachable(where, port, wait=TIMEOUT)
            assert not other.reachable(where, port, wait=0.3), port


@pytest.mark.parametrize("mode", ["rootless"])
def test_a_rootless_vm_does_not_reach_bridged_ones(world: World, start: Start) -> None:
    """slirp4netns is a process of the host, which reaches every port of theirs."""
    before = world.network(spec.parse("bridged", ["81"]), "before")
    _, guest = start()
    after = world.network(spec.parse("bridged", ["81"]), "after")
    for network in (before, after):
        other, where = world.guest(network), network.describe()["host_ip"]
        for port in (81, 82):
            world.server(other, str(port), "0.0.0.0", port)
            assert world.host.reachable(where, port, wait=TIMEOUT)
        assert guest.ask(HOST_IP, port_of(network)).startswith(b"81 ")
        assert not guest.reachable(where, 82, wait=0.5)


def test_publishing_on_a_running_vm(world: World, start: Start) -> None:
    network, guest = start("80")
    world.server(guest, "80", "0.0.0.0", 80)
    world.server(guest, "81", "0.0.0.0", 81)
    (later,) = world.host.run(lambda: network.publish(parse("81")))
    assert network.describe()["ports"][1]["host_port"] == later.host_port
    assert world.lan.ask(HOST_IP, later.host_port).startswith(b"81 ")
    assert world.host.ask("127.0.0.1", port_of(network)).startswith(b"80 ")
    with pytest.raises(ConflictError):
        world.host.run(lambda: network.publish(parse(f"{later.host_port}:82")))
    assert len(network.describe()["ports"]) == 2


def test_publishing_is_all_or_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    network = world.network(spec.parse("rootless"))
    forward, forwarded = Slirp.forward, []

    def refuse_the_second(self: Slirp, *words: object) -> int:
        if forwarded:
            raise NetworkError("slirp4netns refused.")
        forwarded.append(words[1])
        return forward(self, *words)  # type: ignore[arg-type]

    monkeypatch.setattr(Slirp, "forward", refuse_the_second)
    with pytest.raises(NetworkError, match="refused"):
        world.host.run(lambda: network.publish(parse("53/udp,80,81")))
    assert network.describe()["ports"] == []
    (port,) = forwarded
    assert not world.host.reachable("127.0.0.1", port)
    monkeypatch.undo()
    world.host.run(lambda: network.publish(parse(f"{port}:80,{port}:53/udp")))


def test_publishing_on_a_vm_that_had_no_ports(world: World, start: Start) -> None:
    network, guest = start()
    world.server(guest, "80", "0.0.0.0", 80)
    world.server(guest, "53", "0.0.0.0", 53, kind=socket.SOCK_DGRAM)
    tcp, local, udp = world.host.run(lambda: network.publish(parse("80,[::1]::80,53/udp")))
    assert world.lan.ask(HOST_IP, tcp.host_port).startswith(b"80 ")
    assert world.host.ask("::1", local.host_port).startswith(b"80 ")
    assert world.host.ask_udp("127.0.0.1", udp.host_port).startswith(b"53 ")


def test_a_port_in_use_is_an_error_and_leaves_nothing(world: World, mode: str, start: Start) -> None:
    server = world.server(world.host, "mine", "127.0.0.1")
    interfaces, tables = world.host.interfaces(), world.host.tables()
    with pytest.raises(ConflictError, match=f"Port {server.port}/tcp is in use by"):
        start(f"{server.port}:80")
    assert world.host.interfaces() == interfaces
    assert world.host.tables() == tables


def test_the_rules_read_as_they_are_meant(tmp_path: Path) -> None:
    world = World(tmp_path)
    try:
        wanted = spec.parse("bridged", ["8080:80,127.0.0.1:5353:53/udp"], ["5432"])
        network = world.network(wanted)
        inner = network.describe()["host_ip"]
        outer = str(ip_address(inner) - 1)
        interface = network.describe()["interface"]
        listed = world.host.shell("nft list ruleset")
        inside = subprocess.run(
            ["nft", "list", "ruleset"], preexec_fn=network.namespace.enter, capture_output=True, text=True, check=True
        ).stdout
    finally:
        world.close()
    rules = [line.strip() for line in (listed + inside).splitlines()]
    for rule in (
        "flags owner",
        f"meta nfproto ipv4 fib daddr type local tcp dport 8080 dnat ip to {inner}:80",
        f"ip daddr 127.0.0.1 udp dport 5353 dnat ip to {inner}:53",
        f'oifname != "fcvm*" ip saddr {inner} masquerade',
        f'oifname "{interface}" ip saddr 127.0.0.0/8 masquerade',
        f'iifname "up0" ip saddr {outer} dnat ip to 10.0.2.100',
        'iifname "tap0" ip daddr 10.0.2.2 tcp dport 5432 accept',
        f'iifname "tap0" ip daddr 10.0.2.2 meta l4proto tcp dnat ip to {outer}',
        'iifname "up0" meta nfproto ipv4 tcp dport 80 dnat ip to 10.0.2.100',
        f'oifname "up0" meta nfproto ipv4 snat ip to {inner}',
        "type filter hook forward priority filter; policy drop;",
        "ct state established,related accept",
        'iifname "up0" oifname "tap0" ct status dnat accept',
    ):
        assert rule in rules, rule
    assert not [rule for rule in rules if "udp dport 53 " in rule]  # that of the loopback is the host's alone


def test_the_guest_of_network_none_reaches_nothing(world: World) -> None:
    network = world.network(spec.parse("none"))
    guest = world.guest(network)
    server = world.server(world.host, "host", "0.0.0.0")
    assert network.describe()["ports"] == []
    for ip in (GATEWAY, RESOLVER, HOST_IP, LAN_IP):
        assert not guest.reachable(ip, server.port, wait=0.2)


def test_bridged_needs_root(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(NetworkError, match="needs root") as caught:
        attach.create(spec.parse("bridged"), "vm1", world.directory)
    assert caught.value.hint
    assert "rootless" in caught.value.hint
