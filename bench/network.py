"""What a VM's network costs on this host: to set up, beside the same by ``ip``, ``nft`` and ``unshare`` commands, and to use,
beside a guest's link without translation. All in one run, taking turns, so that other load hits every side alike.

    python -m bench.network [--quick] [--json FILE]

Needs root. The host, the other host and the guest are namespaces (tests/network_world.py); this machine's network is not
touched. Throughput is the kernel's part alone: the guest's end is a veth pair in the place of Firecracker's tap, so it says what
the translation costs and not what virtio does.
"""

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from network_world import HOST_IP, LAN_IP, Place, World

from fcvm.linux import namespaces, rtnetlink, tap
from fcvm.network import attach, guest, spec

# (mode, milliseconds at p50 that a set-up may take)
TARGETS = {"bridged": 3.0, "rootless": 10.0}

# The same as bridged networking, as one would type it
BY_HAND = """
ip netns add hand
ip link add fcvmhand type veth peer name up0 netns hand
ip -n hand tuntap add tap0 mode tap vnet_hdr
ip -n hand link set lo up
ip -n hand link set tap0 address aa:fc:00:00:00:02 up
ip -n hand link set up0 up
ip -n hand addr add 10.0.2.2/24 dev tap0
ip -n hand addr add 10.0.2.3/24 dev tap0
ip -n hand addr add 172.31.0.2/30 dev up0
ip addr add 172.31.0.1/30 dev fcvmhand
ip link set fcvmhand up
ip -n hand route add default via 172.31.0.1
ip netns exec hand sysctl -qw net.ipv4.ip_forward=1
sysctl -qw net.ipv4.conf.fcvmhand.route_localnet=1
ip netns exec hand nft -f - <<END
table inet fcvm {
    chain prerouting {
        type nat hook prerouting priority dstnat
        iifname up0 dnat ip to 10.0.2.100
    }
    chain postrouting {
        type nat hook postrouting priority srcnat
        oifname up0 snat ip to 172.31.0.2
    }
    chain forward {
        type filter hook forward priority filter; policy drop
        iifname tap0 oifname up0 accept
        iifname up0 oifname tap0 ct state established,related accept
        iifname up0 oifname tap0 ct status dnat accept
    }
}
END
nft -f - <<END
table inet hand {
    chain prerouting {
        type nat hook prerouting priority dstnat
        fib daddr type local tcp dport 8081 dnat ip to 172.31.0.2:80
    }
    chain output {
        type nat hook output priority -100
        fib daddr type local tcp dport 8081 dnat ip to 172.31.0.2:80
    }
    chain postrouting {
        type nat hook postrouting priority srcnat
        ip saddr 172.31.0.2 masquerade
        ip saddr 127.0.0.0/8 oifname fcvmhand masquerade
    }
}
END
"""
REMOVE_BY_HAND = "nft delete table inet hand; ip netns del hand; ip link del fcvmhand 2>/dev/null || true"

# The same as rootless networking: a namespace, and slirp4netns attached to it
SLIRP_BY_HAND = """
unshare --user --map-root-user --net sleep 1000 &
pid=$!
while [ "$(readlink /proc/$pid/ns/user)" = "$(readlink /proc/self/ns/user)" ] || ! grep -q . /proc/$pid/uid_map; do :; done
mkfifo "$1/ready"
slirp4netns --configure --mtu=65520 --disable-host-loopback --api-socket "$1/api.sock" --ready-fd=3 $pid up0 3>"$1/ready" 2>/dev/null >&2 &
slirp=$!
read -r answer < "$1/ready" || true
nsenter -t $pid -U -n --preserve-credentials sh -ec '
ip tuntap add tap0 mode tap vnet_hdr
ip addr add 10.0.2.2/24 dev tap0
ip link set tap0 up
echo 1 > /proc/sys/net/ipv4/ip_forward
nft add table inet fcvm "{ chain post { type nat hook postrouting priority srcnat; oifname up0 masquerade; }; }"'
echo $pid $slirp
"""


def milliseconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1000


def summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    p50, p90 = statistics.median(ordered), ordered[int(0.9 * (len(ordered) - 1))]
    return {"p50": round(p50, 3), "p90": round(p90, 3), "min": round(ordered[0], 3), "n": len(ordered)}


def set_up(world: World, mode: str, rounds: int) -> dict[str, Any]:
    """Milliseconds to set a network up with one published port, and to take it down; and the same by hand."""
    ours, down, hand = [], [], []
    directory = world.directory / mode
    directory.mkdir()
    wanted = spec.parse(mode, ["8080:80"])
    interfaces = world.host.interfaces()

    def settle() -> None:
        """Wait until the kernel has taken the last namespace apart, which holds locks that a set-up needs."""
        while world.host.interfaces() != interfaces:
            time.sleep(0.005)
        time.sleep(0.02)

    for number in range(rounds + 2):
        made: list[Any] = []
        up = world.host.run(lambda made=made: milliseconds(lambda: made.append(attach.create(wanted, "vm", directory))))
        off = world.host.run(lambda made=made: milliseconds(made[0].close))
        settle()
        if mode == "bridged":
            by_hand = milliseconds(lambda: world.host.shell(BY_HAND))
            world.host.shell(REMOVE_BY_HAND)
        else:
            by_hand = slirp_by_hand(world)
        settle()
        if number >= 2:  # after warming up
            ours.append(up)
            down.append(off)
            hand.append(by_hand)
    result = {"set up": summary(ours), "take down": summary(down), "by commands": summary(hand)}
    ratio = statistics.median(ours) / statistics.median(hand)
    return {
        **result,
        "ratio": round(ratio, 3),
        "target ms": TARGETS[mode],
        "met": summary(ours)["p50"] <= TARGETS[mode],
    }


def slirp_by_hand(world: World) -> float:
    with tempfile.TemporaryDirectory() as directory:
        pids: list[str] = []

        def start() -> None:
            process = subprocess.Popen(
                ["sh", "-ec", SLIRP_BY_HAND, "sh", directory], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True, preexec_fn=world.host.namespace.enter,
            )  # fmt: skip
            assert process.stdout is not None
            with process.stdout as out:
                pids.extend(out.readline().split())
            process.wait()

        taken = milliseconds(start)
        for pid in reversed(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        return taken


def fresh_process(world: World, rounds: int) -> dict[str, float]:
    """Milliseconds of a set-up as a new process has it, which has imported everything and done nothing yet."""
    code = (
        "import time; from pathlib import Path; from fcvm.network import attach, bridged, spec\n"
        "wanted = spec.parse('bridged', ['8080:80']); start = time.perf_counter()\n"
        "attach.create(wanted, 'vm', Path('/')); print((time.perf_counter() - start) * 1000, flush=True); import os; os._exit(0)"
    )
    values = []
    for _ in range(rounds):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONPATH": str(Path(attach.__file__).parents[2])}, preexec_fn=world.host.namespace.enter,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        values.append(float(done.stdout))
    return summary(values)


@contextlib.contextmanager
def wired_guest(world: World, vm_id: str) -> Iterator[tuple[Place, Any]]:
    """A bridged network whose guest hangs on a veth pair instead of a tap, so that no Python carries its packets."""
    place = Place()
    made = tap.create

    def pair(name: str, **_: Any) -> None:
        with rtnetlink.open_socket() as route:
            route.request([rtnetlink.veth(name, "eth0", place.namespace.net, mtu=1500)])

    tap.create = pair
    try:
        network = world.network(spec.parse("bridged", ["80"]), vm_id)
    finally:
        tap.create = made

    def configure() -> None:
        index = socket.if_nametoindex("eth0")
        messages = [rtnetlink.set_link(index, mac=guest.MAC), rtnetlink.address(index, guest.ADDRESS)]
        place.links([*messages, rtnetlink.default_route(guest.GATEWAY.ip, index)])

    place.run(configure)
    try:
        yield place, network
    finally:
        place.close()


@contextlib.contextmanager
def bare_guest(world: World) -> Iterator[Place]:
    """A guest on a veth pair of the host: routed, not translated."""
    place = Place()
    inner = place.namespace.net
    world.host.run(lambda: world.host.links([rtnetlink.veth("bare0", "eth0", inner, mtu=1500)]))
    for where, name, address in ((world.host, "bare0", "172.31.9.1/30"), (place, "eth0", "172.31.9.2/30")):

        def configure(where: Place = where, name: str = name, address: str = address) -> None:
            index = socket.if_nametoindex(name)
            where.links([rtnetlink.set_link(index), rtnetlink.address(index, ip_interface(address))])
            if where is place:
                where.links([rtnetlink.default_route(ip_address("172.31.9.1"), index)])

        where.run(configure)
    world.host.shell("sysctl -qw net.ipv4.conf.bare0.forwarding=1")
    world.lan.shell(f"ip route replace 172.31.9.0/30 via {HOST_IP}")
    yield place
    place.close()


def gigabits(sender: Place, receiver: Place, ip: str, port: int, seconds: float, *, to: tuple[str, int]) -> float:
    """TCP throughput from ``sender`` to what listens at ``ip``:``port`` of ``receiver``, reached at ``to``."""
    with receiver.make_socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((ip, port))
        listener.listen()
        address = (to[0], to[1] or listener.getsockname()[1])
        received = [0]

        def receive() -> None:
            sock, _ = listener.accept()
            buffer = bytearray(1 << 20)
            with sock:
                while count := sock.recv_into(buffer):
                    received[0] += count

        thread = threading.Thread(target=receive)
        thread.start()
        data = bytes(1 << 18)
        with sender.connect(*address) as sock:
            start = time.perf_counter()
            while time.perf_counter() - start < seconds:
                sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            thread.join()
        return received[0] * 8 / (time.perf_counter() - start) / 1e9


def throughput(world: World, rounds: int, seconds: float) -> dict[str, Any]:
    """Gbit/s out of and into a guest, translated and not; the ratio is of the medians."""
    rates: dict[str, list[float]] = {}
    with wired_guest(world, "wired") as (inside, network), bare_guest(world) as bare:
        port = network.describe()["ports"][0]["host_port"]
        for _ in range(rounds):
            for name, measure in {
                "out": lambda: gigabits(inside, world.lan, LAN_IP, 0, seconds, to=(LAN_IP, 0)),
                "out, bare": lambda: gigabits(bare, world.lan, LAN_IP, 0, seconds, to=(LAN_IP, 0)),
                "in": lambda: gigabits(world.lan, inside, "0.0.0.0", 80, seconds, to=(HOST_IP, port)),
                "in, bare": lambda: gigabits(world.lan, bare, "0.0.0.0", 80, seconds, to=("172.31.9.2", 80)),
            }.items():
                rates.setdefault(name, []).append(measure())
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {name: round(medians[name] / medians[f"{name}, bare"], 3) for name in ("out", "in")}
    return {"gigabits": {name: round(value, 2) for name, value in medians.items()}, "ratio": ratios}


def crowd(world: World, count: int) -> dict[str, Any]:
    """Milliseconds to set up a network when there are many already."""
    wanted = spec.parse("bridged", ["80"])
    times = []
    for number in range(count):
        directory = world.directory / f"crowd{number}"
        directory.mkdir()
        times.append(
            world.host.run(
                lambda number=number, directory=directory: milliseconds(
                    lambda: world.keep(attach.create(wanted, f"crowd{number}", directory))
                )
            )
        )
    last = times[-min(20, count) :]
    return {"networks": count, "first 20": summary(times[:20]), "last 20": summary(last)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, for a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    arguments = parser.parse_args()
    rounds, seconds = (5, 0.3) if arguments.quick else (40, 1.0)
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory))
        try:
            results: dict[str, Any] = {
                "host": {"kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version()},
                "bridged": set_up(world, "bridged", rounds),
                "rootless": set_up(world, "rootless", rounds),
                "bridged, first of a process": fresh_process(world, rounds),
                "throughput": throughput(world, 3 if arguments.quick else 7, seconds),
                "many": crowd(world, 40 if arguments.quick else 250),
            }
        finally:
            world.close()
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    namespaces.current()  # fails early where there are none
    main()
