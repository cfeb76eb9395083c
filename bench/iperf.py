"""Throughput of real guests by iperf3, host to guest and back, in every network mode, beside the links that they rest on.

    python -m bench.iperf [--only MODE] [--rounds N] [--seconds N] [--json FILE]

Bridged stands beside a plain Firecracker with the same kernel on a bare tap of the host: no namespace, no translation. Rootless
stands beside slirp4netns with no VM behind it, which is the most that it can do. All take turns in one run. The guests have one
CPU: where the machine gives all VMs a single one, a second only adds chance. Runs where the VMs are, as root; `python -m bench` starts it there.

Target: bridged at least 0.95 of the bare tap.
"""

import argparse
import contextlib
import json
import os
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from ipaddress import ip_interface
from pathlib import Path

from bench import common, floor
from bench.guests import PATIENCE, call, run
from fcvm import config, host, setup
from fcvm.firecracker import boot
from fcvm.firecracker.process import Firecracker
from fcvm.linux import rtnetlink, tap
from fcvm.machine.sync import HOST
from fcvm.network.guest import MAC
from fcvm.setup.kernel import boot_args
from fcvm.storage import disks
from fcvm.storage.layout import Layout, remove
from fcvm.vm import state
from fcvm.vm.spec import RunSpec

TARGET = 0.95
PORT = 5201
LINK = "fcvmbare0"
HOST_SIDE, GUEST_SIDE = "172.31.251.1/30", "172.31.251.2/30"
MODES = ("bridged", "rootless")

Sides = dict[str, tuple[str, int]]  # address and port of each server

BARE = f"""#!/bin/sh
mkdir -p /run/images /run/rootfs /scratch/upper /scratch/work
mount -t erofs -o ro /dev/vdc /run/images
lower=$(ls -d /run/images/overlay/*/diff | grep -v /overlay/l/ | tr '\\n' ':')
mount -t overlay -o "lowerdir=${{lower%:}},upperdir=/scratch/upper,workdir=/scratch/work" overlay /run/rootfs
mount --bind /dev /run/rootfs/dev
ip link set lo up
ip addr add {GUEST_SIDE} dev eth0
ip link set eth0 up
exec chroot /run/rootfs iperf3 -s
"""


def iperf() -> list[str]:
    """iperf3; the machine has none of its own and takes its host's, on devices and temporary files of its own."""
    if shutil.which("iperf3"):
        return ["iperf3"]
    script = 'mount --bind /dev "$0/dev" && mount --bind /tmp "$0/tmp" && exec chroot "$0" iperf3 "$@"'
    return ["unshare", "--mount", "sh", "-c", script, str(HOST)]


def megabits(address: str, port: int, seconds: int, *, back: bool) -> float:
    """TCP throughput to the server at ``address``, or back from it."""
    command = [*iperf(), "-J", "-c", address, "-p", str(port), "-t", str(seconds), *(["-R"] if back else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    answer = json.loads(done.stdout or "{}")
    if "error" in answer or done.returncode:
        raise RuntimeError(f"{address}:{port}: {answer.get('error', done.stderr)}")
    return float(answer["end"]["sum_received"]["bits_per_second"]) / 1e6


def wait_for(address: str, port: int) -> None:
    """Wait until somebody answers there."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            megabits(address, port, 1, back=False)
            return
        except RuntimeError:
            if time.monotonic() > end:
                raise
            time.sleep(1)


@contextlib.contextmanager
def bare(settings: config.Config, layout: Layout) -> Iterator[tuple[str, int]]:
    """A plain Firecracker on a bare tap, whose guest serves."""
    assets = setup.find(settings, layout)
    image, _ = common.image(layout, "iperf")
    subprocess.run(["ip", "link", "del", LINK], stderr=subprocess.DEVNULL, check=False)  # of a run that was killed
    tap.create(LINK)
    try:
        with rtnetlink.open_socket() as route:
            index = socket.if_nametoindex(LINK)
            route.request([rtnetlink.set_link(index), rtnetlink.address(index, ip_interface(HOST_SIDE))])
        directory = floor.fresh(layout.cache, "iperf")
        try:
            floor.furnish(assets, image.path, directory, [], BARE)
            disks.make_scratch(layout, 1024, directory / boot.SCRATCH_DISK)
            with Firecracker(assets.firecracker, directory, "iperf") as vmm:
                arguments = boot_args(emulated=host.emulated(), role="vm")
                boot.configure(vmm.api, boot.Hardware(1, 512, arguments, LINK, MAC))
                boot.start(vmm.api)
                yield str(ip_interface(GUEST_SIDE).ip), PORT
        finally:
            remove(directory)
    finally:
        subprocess.run(["ip", "link", "del", LINK], check=True)


@contextlib.contextmanager
def vm(mode: str, layout: Layout) -> Iterator[Sides]:
    """A VM of ours that serves: at its own address, if the mode gives it one, and on a published port."""
    _, use = common.image(layout, "iperf")
    name = f"iperf-{mode}-{os.getpid()}"
    port = PORT + 2 + MODES.index(mode)  # given, as in the machine a chosen one would be told for its host
    run(RunSpec(name=name, image=use, cpu=1, memory=512, network=mode, publish=[f"127.0.0.1:{port}:{PORT}"], detach=True))
    try:
        own = state.find(layout, name=name).network.get("host_ip")
        yield {mode: (own, PORT), f"{mode}, published port": ("127.0.0.1", port)} if own else {mode: ("127.0.0.1", port)}
    finally:
        call("stop", "-t", "0", name)


@contextlib.contextmanager
def slirp() -> Iterator[tuple[str, int]]:
    """slirp4netns alone: a server in a namespace that it serves."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())

        def start(*command: str, **options: object) -> subprocess.Popen[bytes]:
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
            stack.callback(child.wait)
            stack.callback(child.kill)
            return child

        ours = os.readlink("/proc/self/ns/net")
        inside = start("unshare", "--net", "sleep", "infinity")
        while os.readlink(f"/proc/{inside.pid}/ns/net") == ours:
            time.sleep(0.01)
        ready, told = os.pipe()
        api = f"{directory}/api.sock"
        words = ["--configure", "--mtu=65520", "--disable-host-loopback", f"--api-socket={api}", f"--ready-fd={told}"]
        start("slirp4netns", *words, str(inside.pid), "tap0", pass_fds=(told,))
        os.close(told)
        with open(ready, "rb") as waiting:
            select.select([waiting], [], [], 60)
        start("nsenter", "-t", str(inside.pid), "-n", *iperf(), "-s")
        port = PORT + 1
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(api)
            forward = {"proto": "tcp", "host_addr": "127.0.0.1", "host_port": port, "guest_addr": "10.0.2.100", "guest_port": PORT}
            control.sendall(json.dumps({"execute": "add_hostfwd", "arguments": forward}).encode())
            control.shutdown(socket.SHUT_WR)
            answer = control.recv(1000)
            if b"return" not in answer:
                raise RuntimeError(f"slirp4netns: {answer!r}")
        yield "127.0.0.1", port


def beside(rates: dict[str, list[float]], name: str) -> dict[str, object]:
    """What ``name`` carried in all rounds together, in Mbit/s and as a ratio to its floor's; and the quartiles of the rounds' ratios."""
    of = "bare tap" if name.startswith(("bare tap", "bridged")) else "slirp4netns alone"
    ratios = [ours / floors for ours, floors in zip(rates[name], rates[of], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "megabits": round(statistics.mean(rates[name]), 1),
        "of": of,
        "ratio": round(statistics.mean(rates[name]) / statistics.mean(rates[of]), 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "rounds": len(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one short round, for a look")
    parser.add_argument("--only", choices=MODES, help="this mode beside its floor, and nothing else that takes CPU time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rounds, seconds = (1, 2) if args.quick else (args.rounds, args.seconds)
    settings = config.load()
    layout = Layout(settings.base_dir)
    rates: dict[str, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        sides: Sides = {}
        if args.only != "rootless":
            sides["bare tap"] = stack.enter_context(bare(settings, layout))
        if args.only != "bridged":
            sides["slirp4netns alone"] = stack.enter_context(slirp())
        for mode in [args.only] if args.only else MODES:
            sides |= stack.enter_context(vm(mode, layout))
        for where in sides.values():
            wait_for(*where)
        for _ in range(rounds):
            for back in (False, True):
                for name, (address, port) in sides.items():
                    rate = megabits(address, port, seconds, back=back)
                    print(f"{name}, {'back' if back else 'there'}: {rate:.0f} Mbit/s", file=sys.stderr, flush=True)
                    rates.setdefault("guest to host" if back else "host to guest", {}).setdefault(name, []).append(rate)
    results: dict[str, object] = {"machine": common.machine(), "target": TARGET}
    results["throughput"] = {way: {name: beside(sides_of, name) for name in sides_of} for way, sides_of in rates.items()}
    print(json.dumps(results, indent=1))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
