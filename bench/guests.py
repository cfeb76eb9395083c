"""Clones of a real guest, beside the same steps by hand, in the same run.

    python -m bench.guests [--quick] [--many N] [--json FILE]

The guest runs nginx, or the demo image where nginx was not built (`examples/build nginx`). Runs where the VMs are; `python -m
bench` starts it there. Pairs of measurements alternate, so that other load on the host hits both alike.
"""

import argparse
import contextlib
import itertools
import json
import os
import secrets
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from bench.common import FCVM, INTERPRETER, available, beside, image, machine, now, pss, show, summary
from fc_agent.protocol import Identity, NetworkPlan
from fcvm import config, hostpath, setup
from fcvm.agent import session, vsock
from fcvm.agent.control import Control
from fcvm.firecracker.process import VSOCK, Firecracker
from fcvm.network import attach
from fcvm.network import spec as networks
from fcvm.snapshots import restore, store
from fcvm.snapshots.client import Clone, Wanted
from fcvm.storage.layout import Layout, remove
from fcvm.vm import paths, state
from fcvm.vm.spec import RunSpec

PATIENCE = 900.0  # seconds; emulated guests on a busy host take their time
COMMAND = ["busybox", "echo", "ready"]
MIB = 1024  # KiB


class Bench:
    """A running nginx, its snapshot, and a clone server."""

    def __init__(self, rounds: int, many: int, stack: contextlib.ExitStack) -> None:
        self.rounds = rounds
        self.many = many
        self.config = config.load()
        self.layout = Layout(self.config.base_dir)
        self.assets = setup.find(self.config, self.layout)
        self.image, self.use = image(self.layout, "nginx")
        self.tag = f"bench-{secrets.token_hex(4)}"
        self.numbers = itertools.count()
        stack.enter_context(self._running())
        call("snapshot", "create", self.tag, "--tag", self.tag)
        stack.callback(call, "snapshots", "rm", self.tag)
        self.snapshot = store.find(self.layout, self.tag)

    def spec(self, **changes: Any) -> RunSpec:
        values = {"name": f"bench-{os.getpid()}-{next(self.numbers)}", "image": self.use, "memory": 512, **changes}
        return RunSpec(**values)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        run(self.spec(name=self.tag, detach=True))
        try:
            record = state.find(self.layout, name=self.tag)
            self.source = self.layout.vms / record.id
            deadline = now() + PATIENCE
            while (state.read(self.layout, record.id) or record).health != "healthy":
                if now() > deadline:
                    raise RuntimeError("the baseline is not healthy")
                time.sleep(0.2)
            yield
        finally:
            call("stop", self.tag)

    @contextlib.contextmanager
    def server(self, ready: int) -> Iterator[int]:
        """The pid of a clone server with so many clones ready."""
        words = [*FCVM, "snapshot", "serve", self.tag, "--pool", str(ready)]
        with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                yield int(process.stdout.readline())
            finally:
                process.terminate()


class ByHand:
    """A clone made with the parts that it needs, and no server, no registration, no supervisor: the floor."""

    def __init__(self, bench: Bench) -> None:
        self.id = state.new_id()
        self.undo = contextlib.ExitStack()
        self.directory = bench.layout.vms / f".floor-{self.id}"
        self.directory.mkdir()
        self.undo.callback(remove, self.directory)
        restore.furnish(self.directory, bench.snapshot, restore.find_disks(bench.snapshot, bench.layout))
        network = self.undo.enter_context(
            attach.create(networks.parse(bench.snapshot.manifest.network), self.id, self.directory)
        )
        self.network = NetworkPlan.from_json(network.guest.json())
        self.control = self.undo.enter_context(contextlib.closing(Control(self.directory / paths.VSOCK)))
        self.vmm = self.undo.enter_context(
            Firecracker(bench.assets.firecracker, self.directory, self.id, namespace=network.namespace)
        )
        restore.load(self.vmm, bench.snapshot)

    def resume(self) -> None:
        restore.resume(self.vmm.api)

    def become(self) -> None:
        """Wait for the agent, give it its identity, wait until it has taken that."""
        done = False
        while not done:
            select.select([self.control], [], [], PATIENCE)
            for message in self.control.receive():
                if message["type"] == "hello":
                    new = Identity("floor", os.urandom(16).hex(), "", time.time_ns(), self.network, True)
                    self.control.send({"type": "restored", "identity": new.to_json()})
                done |= message["type"] == "ready"

    def close(self) -> None:
        self.undo.close()


def run(spec: RunSpec) -> dict[str, float]:
    """`fcvm podman run`: the stages that --timings prints, in seconds since the start."""
    envelope = {"args": {"fcvm_command": "podman", "action": "run", "spec": spec.to_json()}, "settings": {}}
    command = [sys.executable, "-m", "fcvm.cli.remote", json.dumps(envelope)]
    env = {**os.environ, hostpath.HOST_ROOT: "/"}  # the paths of the specification are this side's
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    rows = [line.rsplit(None, 4) for line in done.stderr.splitlines() if line.endswith(" s")]
    return {row[0].strip(): float(row[3]) for row in rows if len(row) == 5}


def call(*words: str) -> None:
    subprocess.run([*FCVM, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)


def ask(directory: Path, command: Sequence[str] = COMMAND, *, target: str = "container") -> bytes:
    """Run a command in a guest and return what it prints; an error if it fails."""
    output: list[bytes] = []
    connect = partial(vsock.connect, directory / VSOCK, paths.SESSION_PORT, paths.SESSION_TIMEOUT)
    request = session.Request(command, target=target)
    end = session.stream(connect, request, stdin=None, on_output=lambda _, data: output.append(data))
    if end.code != 0:
        raise RuntimeError(f"{command} ended with {end}: {output}")
    return b"".join(output)


def timed(work: Callable[[], object]) -> float:
    start = now()
    work()
    return now() - start


# ---- the measurements


def first_exec(bench: Bench) -> dict[str, Any]:
    """A pooled clone, from its request to its first exec answered; and the same as a whole process."""
    floor: list[float] = []
    ours: list[float] = []
    python: list[float] = []
    whole: list[float] = []

    def by_hand() -> None:
        hand = ByHand(bench)

        def go() -> None:
            hand.resume()
            hand.become()
            ask(hand.directory)

        floor.append(timed(go))
        hand.close()

    def by_us() -> None:
        start = now()
        clone = Clone(bench.layout, pid, Wanted(None, []))
        directory = bench.layout.vms / clone.started()["id"]
        ask(directory)
        ours.append(now() - start)
        clone.close()

    def process() -> None:
        words = [*FCVM, "snapshot", "run", "--pid", str(pid), "--exec", " ".join(COMMAND)]
        whole.append(timed(lambda: subprocess.run(words, stdout=subprocess.DEVNULL, check=True)))

    def interpreter() -> None:
        python.append(timed(lambda: subprocess.run(INTERPRETER, check=True)))

    with bench.server(1) as pid:
        for number in range(bench.rounds):
            steps = (by_hand, by_us, interpreter, process)
            for step in steps if number % 2 else reversed(steps):
                time.sleep(1.0)  # what was ended before comes to rest, the pool fills
                step()
    sums = [p + o for p, o in zip(python, ours, strict=True)]
    return {
        "request to first exec": beside(floor, ours),
        "snapshot run --exec, whole process": beside(sums, whole),
        "interpreter": summary(python),
    }


# Printed by it: the seconds that `crun exec` of the arguments in the guest's only container takes.
CRUN = """
import subprocess, sys, time
container = subprocess.run(["crun", "list", "-q"], stdout=subprocess.PIPE, text=True, check=True).stdout.split()[0]
start = time.perf_counter()
subprocess.run(["crun", "exec", container, *sys.argv[1:]], stdout=subprocess.DEVNULL, check=True)
print(time.perf_counter() - start)
"""


def one_exec(bench: Bench) -> dict[str, Any]:
    """`fcvm exec` as a whole process, beside an interpreter's start here and `crun exec` in the guest."""
    python: list[float] = []
    crun: list[float] = []
    ours: list[float] = []

    def floor() -> None:
        python.append(timed(lambda: subprocess.run(INTERPRETER, check=True)))
        crun.append(float(ask(bench.source, ["python3", "-c", CRUN, *COMMAND], target="vm")))

    def fcvm() -> None:
        words = [*FCVM, "exec", bench.tag, "--", *COMMAND]
        ours.append(timed(lambda: subprocess.run(words, stdout=subprocess.DEVNULL, check=True)))

    for number in range(2 * bench.rounds):
        for step in (floor, fcvm) if number % 2 else (fcvm, floor):
            step()
    floors = [a + b for a, b in zip(python, crun, strict=True)]
    return {**beside(floors, ours), "interpreter": summary(python), "crun": summary(crun)}


def together(bench: Bench) -> dict[str, Any]:
    """Many clones requested at once, until all have answered; beside as many resumes by hand."""
    hands = [ByHand(bench) for _ in range(bench.many)]
    with ThreadPoolExecutor(bench.many) as threads:

        def live(hand: ByHand) -> None:
            hand.become()
            ask(hand.directory)

        start = now()
        for hand in hands:
            hand.vmm.api.socket.sendall(restore.RESUME)
        list(threads.map(live, hands))
        floor = now() - start
        for hand in hands:
            hand.close()
        with bench.server(bench.many) as pid:
            start = now()
            clones = [Clone(bench.layout, pid, Wanted(None, [])) for _ in range(bench.many)]
            list(threads.map(lambda clone: ask(bench.layout.vms / clone.started()["id"]), clones))
            ours = now() - start
            for clone in clones:
                clone.close()
    return beside([floor], [ours])


def memory(bench: Bench) -> dict[str, Any]:
    """Memory of clones that have each served a page: PSS without what each has written, and the fall of MemAvailable."""
    result: dict[str, Any] = {}
    page = ["busybox", "wget", "-q", "-O", "/dev/null", "http://127.0.0.1/"]
    for count in (1, 10, bench.many):
        with bench.server(0) as pid:
            before = available()
            clones = [Clone(bench.layout, pid, Wanted(None, [])) for _ in range(count)]
            directories = [bench.layout.vms / clone.started()["id"] for clone in clones]
            for directory in directories:
                ask(directory, page)
            pids = firecrackers(directories)
            sizes = [pss(pid) for pid in pids]
            written = [private_dirty(pid) for pid in pids]
            fall = (before - available()) / count
            for clone in clones:
                clone.close()
        result[f"{count} clones"] = {
            "pss_mib": round(statistics.mean(sizes) / MIB, 2),
            "written_mib": round(statistics.mean(written) / MIB, 2),
            "beyond_mib": round((sum(sizes) - sum(written)) / count / MIB, 2),
            "available_mib": round(fall / MIB, 2),
        }
    return result


def firecrackers(directories: list[Path]) -> list[int]:
    """The pids of the Firecrackers that work in these directories."""
    wanted = {os.path.realpath(directory) for directory in directories}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "comm").read_text() == "firecracker\n" and os.readlink(process / "cwd") in wanted:
                found.append(int(process.name))
    if len(found) != len(wanted):
        raise RuntimeError(f"{len(found)} of {len(wanted)} clones found")
    return found


def private_dirty(pid: int) -> int:
    """KiB that only this process has, and has written (proc_pid_smaps(5))."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))


def start(bench: Bench) -> dict[str, Any]:
    """`podman run` to its first output: from a boot snapshot, cold, and Podman's own start in a guest that runs."""
    inside: list[float] = []
    snapshot: list[float] = []
    cold: list[float] = []
    podman = ["podman", "run", "--rm", "--network=none", bench.image.id, *COMMAND]

    def by_podman() -> None:
        inside.append(timed(lambda: ask(bench.source, podman, target="vm")))

    def by_snapshot() -> None:
        snapshot.append(run(bench.spec(command=COMMAND, timings=True))["first output"])

    def by_boot() -> None:
        cold.append(run(bench.spec(command=COMMAND, timings=True, snapshot=False))["first output"])

    by_podman()  # the first one loads Podman; ours is loaded in the snapshot
    by_snapshot()  # the first one takes the boot snapshot
    inside.clear()
    snapshot.clear()
    for number in range(bench.rounds):
        steps = (by_podman, by_snapshot, by_boot)
        for step in steps if number % 2 else reversed(steps):
            step()
    return {
        "boot snapshot, beside podman run in a guest": beside(inside, snapshot),
        "boot snapshot, beside cold": beside(cold, snapshot),
    }


MEASUREMENTS = {
    "exec": one_exec,
    "pooled clone": first_exec,
    "clones together": together,
    "memory per clone": memory,
    "podman run": start,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a fifth of the repetitions, and ten clones for fifty")
    parser.add_argument("--many", type=int, metavar="N", help="how many clones together (default 50)")
    parser.add_argument(
        "--json", type=Path, help="write the results here as well; -: to stdout, alone on the last line"
    )
    parser.add_argument("--only", help="only measurements whose name contains this; the file keeps what it has of the others")
    args = parser.parse_args(arguments)
    many = args.many or (10 if args.quick else 50)
    kept = json.loads(args.json.read_text()) if args.only and args.json and args.json.is_file() else {}
    results: dict[str, Any] = {**kept, "machine": machine()}
    show("machine", results["machine"])
    with contextlib.ExitStack() as stack:
        bench = Bench(2 if args.quick else 10, many, stack)
        results["many"] = many
        for title, measure in MEASUREMENTS.items():
            if args.only is None or args.only in title:
                results[title] = measure(bench)
                show(title, results[title])
    if args.json == Path("-"):
        print(json.dumps(results))
    elif args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
