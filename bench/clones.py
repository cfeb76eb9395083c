"""What cloning costs on this host, beside its floor: the same work by hand, in the same run.


The guests are bare-metal ones (tests/host/baremetal), so what is measured is Firecracker, the kernel and fcvm, not
a guest's operating system. Each pair of measurements alternates, so that other load on the host hits both alike.
"""

import argparse
import contextlib
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/host"))

import baremetal
from baremetal import FIRST, Guest

from bench.common import available, beside, machine, now, pss, show, summary
from fcvm.firecracker import boot
from fcvm.firecracker.api import Api
from fcvm.firecracker.process import API_SOCKET, VSOCK, Firecracker
from fcvm.snapshots import restore, working_set
from fcvm.snapshots.memory import MemoryServer
from fcvm.snapshots.pool import Kit, Loaded, Pool
from fcvm.snapshots.store import Snapshot
from fcvm.storage.layout import Layout

PAGES = 16384  # 64 MiB with a pattern
USED = 2048  # pages of it, in random order, that a clone needs for its first answer
ORDER = (0x5851F42D4C957F2D, 12345, PAGES - 1)
MEMORY = 512  # MiB of each guest


class Bench:
    """A snapshot to measure with, in a directory of its own."""

    def __init__(self, directory: Path, quick: bool) -> None:
        self.directory = directory
        self.quick = quick
        self.layout = Layout(directory / "data")
        self.numbers = 0
        with baremetal.booted(directory / "vm", memory=MEMORY) as vmm:
            with Guest(directory / "vm") as guest:
                guest.fill(FIRST, PAGES, seed=1)
                guest.on_reset(baremetal.STOP_AFTER_REQUEST)  # so that fifty fit on few CPUs
            self.snapshot: Snapshot = baremetal.snapshot(self.layout, "bench", vmm)
        self.disks = {name: directory / f"shared-{name}" for name in (boot.ROOT_DISK, boot.IMAGE_DISK)}
        for path in self.disks.values():
            path.write_bytes(bytes(4096))
        self.firecracker = baremetal.firecracker()

    def repeat(self, count: int) -> range:
        return range(max(3, count // 5) if self.quick else count)

    def place(self) -> Path:
        """A fresh VM directory, furnished."""
        self.numbers += 1
        directory = self.layout.vms / f"clone{self.numbers}"
        directory.mkdir()
        restore.furnish(directory, self.snapshot, self.disks)
        return directory

    def kit(self, **changes: Any) -> Kit:
        return Kit(snapshot=self.snapshot, firecracker=self.firecracker, disks=self.disks, **changes)


class ByHand:
    """A clone made with nothing but system calls: spawn, wait for the socket, one request. The floor."""

    def __init__(self, bench: Bench, *, resume: bool) -> None:
        self.directory = bench.place()
        self.log = open(self.directory / "log", "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            [bench.firecracker, "--api-sock", API_SOCKET, "--level", "Error"],
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,  # as ours have: the scheduler shares the CPUs out by sessions (sched(7), autogroup)
        )
        path = self.directory / API_SOCKET
        while True:
            try:
                self.api = Api(path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.0001)
        body = {
            "snapshot_path": str(bench.snapshot.vmstate),
            "mem_backend": {"backend_type": "File", "backend_path": str(bench.snapshot.memory)},
            "enable_diff_snapshots": True,
            "resume_vm": resume,
        }
        self.api.put("/snapshot/load", body)

    def resume(self) -> None:
        """One request on a raw socket."""
        self.api.socket.sendall(restore.RESUME)
        if b" 204 " not in self.api.socket.recv(4096):
            raise RuntimeError("not resumed")

    def close(self) -> None:
        self.api.close()
        self.process.kill()
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.directory)


def answer(directory: Path, value: int = 1) -> None:
    with Guest(directory) as guest:
        if guest.echo(value) != value:
            raise RuntimeError("wrong answer")


# ---- the measurements


def pooled(bench: Bench, rounds: int, *, to_answer: bool) -> dict[str, Any]:
    """From the request for a clone to its being resumed, or to its answer, beside a bare PATCH of a loaded one."""
    floor: list[float] = []
    ours: list[float] = []

    def by_hand() -> None:
        start = now()
        hand.resume()
        if not to_answer:
            floor.append(now() - start)
        answer(hand.directory)  # it halts then, and leaves the CPU to the other
        if to_answer:
            floor.append(now() - start)

    def by_pool() -> None:
        start = now()
        clone = pool.take()
        clone.resume()
        if not to_answer:
            ours.append(now() - start)
        answer(clone.directory)
        if to_answer:
            ours.append(now() - start)
        clones.append(clone)

    with Pool(bench.kit(), bench.layout.vms, minimum=1, maximum=1) as pool:
        for number in bench.repeat(rounds):
            clones: list[Loaded] = []
            hand = ByHand(bench, resume=False)
            pool.fill()
            for step in (by_hand, by_pool) if number % 2 else (by_pool, by_hand):
                settle()
                step()
            hand.close()
            clones[0].close()
    return beside(floor, ours)


def pooled_resume(bench: Bench) -> dict[str, Any]:
    """To its being resumed."""
    return pooled(bench, 100, to_answer=False)


def pooled_answer(bench: Bench) -> dict[str, Any]:
    """To its first answer over vsock."""
    return pooled(bench, 50, to_answer=True)


def settle(seconds: float = 0.03) -> None:
    """Let what was done before come to rest: Firecracker and the kernel go on working after they have answered."""
    time.sleep(seconds)


def direct(bench: Bench) -> dict[str, Any]:
    """A clone without a pool, to its being resumed: our parts, beside spawn, load and resume by hand."""
    floor: list[float] = []
    ours: list[float] = []

    def by_hand() -> None:
        start = now()
        hand = ByHand(bench, resume=True)
        floor.append(now() - start)
        answer(hand.directory)
        hand.close()

    def by_us() -> None:
        start = now()
        directory = bench.place()
        vmm = Firecracker(bench.firecracker, directory, directory.name)
        restore.check(bench.snapshot, vmm)
        restore.load(vmm, bench.snapshot, resume=True)
        ours.append(now() - start)
        answer(directory)
        vmm.kill()
        shutil.rmtree(directory)

    for number in bench.repeat(50):
        for step in (by_hand, by_us) if number % 2 else (by_us, by_hand):
            settle()
            step()
    return beside(floor, ours)


def together(bench: Bench, count: int = 50) -> dict[str, Any]:
    """Many clones requested at once: until all are resumed, and until all have answered."""
    resumed: tuple[list[float], list[float]] = [], []
    answered: tuple[list[float], list[float]] = [], []

    def by_hand() -> None:
        start = now()
        for hand in hands:
            hand.api.socket.sendall(restore.RESUME)
        for hand in hands:
            hand.api.socket.recv(4096)
        resumed[0].append(now() - start)
        answer_all([hand.directory for hand in hands])
        answered[0].append(now() - start)

    def by_pool() -> None:
        start = now()
        clones.extend(threads.map(lambda _: resumed_clone(pool), range(count)))  # a thread each, as the server has for its clients
        resumed[1].append(now() - start)
        answer_all([clone.directory for clone in clones])
        answered[1].append(now() - start)

    with Pool(bench.kit(), bench.layout.vms, minimum=count, maximum=count) as pool, ThreadPoolExecutor(count) as threads:
        for number in bench.repeat(6):
            clones: list[Loaded] = []
            hands = [ByHand(bench, resume=False) for _ in range(count)]
            for step in (by_hand, by_pool) if number % 2 else (by_pool, by_hand):
                pool.fill()  # before both: it must not be filled beside one of them
                settle(1.0)
                step()
            for clone in (*hands, *clones):
                clone.close()
    return {"resumed": beside(*resumed), "answered": beside(*answered)}


def resumed_clone(pool: Pool) -> Loaded:
    clone = pool.take()
    clone.resume()
    return clone


def answer_all(directories: list[Path]) -> None:
    """Ask all at once, then wait for each."""
    connections = [restore_connection(directory) for directory in directories]
    guests = [Guest.__new__(Guest) for _ in connections]
    for guest, connection in zip(guests, connections, strict=True):
        guest.socket = connection
        guest.socket.recv(64)  # OK
        guest.send(baremetal.ECHO, argument=7)
    for guest in guests:
        if guest.receive() != 7:
            raise RuntimeError("wrong answer")
        guest.close()


def restore_connection(directory: Path) -> Any:
    from fcvm.linux import sockets

    connection = sockets.connect(directory / VSOCK, timeout=60)
    connection.sendall(b"CONNECT %d\n" % baremetal.PORT)
    return connection


def memory(bench: Bench, count: int = 20) -> dict[str, Any]:
    """Proportional set size (smaps_rollup(5)) and fall of MemAvailable per clone, idle and after reading 64 MiB."""
    count = 8 if bench.quick else count
    result: dict[str, Any] = {}
    for backend in restore.BACKENDS:
        with serving(bench, backend) as options:
            for what in ("paused", "read"):
                before = available()
                with Pool(bench.kit(backend=backend, **options), bench.layout.vms, minimum=0) as pool:
                    clones = [pool.take() for _ in range(count)]
                    if what == "read":
                        for clone in clones:
                            clone.resume()
                            with Guest(clone.directory) as guest:
                                assert guest.wrong(FIRST, PAGES, seed=1) == 0
                    sizes = [pss(clone.firecracker.pid) for clone in clones]
                    fall = (before - available()) / count
                    for clone in clones:
                        clone.close()
                result[f"{backend} {what}"] = {"pss_kib": round(statistics.mean(sizes)), "available_kib": round(fall)}
    return result


@contextlib.contextmanager
def serving(bench: Bench, backend: str, recorded: Path | None = None) -> Iterator[dict[str, Any]]:
    """What a kit needs for ``backend``."""
    if backend == "file":
        yield {}
        return
    with MemoryServer(bench.snapshot.memory, bench.directory / "memory.sock", working_set=recorded) as server:
        yield {"memory_socket": server.socket}


def first_answer(bench: Bench) -> dict[str, Any]:
    """A restore to the first answer that needs 8 MiB in random places, with a warm and a cold page cache."""
    record(bench)
    result: dict[str, Any] = {}
    ways = {
        "file": ("file", None),
        "uffd": ("uffd", None),
        "uffd, working set": ("uffd", working_set.path(bench.snapshot)),
    }
    for cache in ("warm", "cold"):
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in bench.repeat(10 if cache == "warm" else 5):
            for name, (backend, recorded) in ways.items():
                if cache == "cold":
                    forget(bench.snapshot.memory)
                else:
                    warm(bench.snapshot.memory)
                with serving(bench, backend, recorded) as options:
                    kit = bench.kit(backend=backend, **options)
                    bench.numbers += 1
                    start = now()
                    with Loaded(kit, f"c{bench.numbers}", bench.layout.vms / f"c{bench.numbers}") as clone:
                        clone.wait()
                        clone.resume()
                        with Guest(clone.directory) as guest:
                            wrong = guest.call(baremetal.CHECK, first=FIRST, count=USED, seed=1, order=ORDER)
                        times[name].append(now() - start)
                        assert wrong == 0
        base = statistics.median(times["file"])
        result[cache] = {
            name: {**summary(found), "ratio": round(statistics.median(found) / base, 2)}
            for name, found in times.items()
        }
    working_set.path(bench.snapshot).unlink()
    return result


def record(bench: Bench) -> None:
    with MemoryServer(bench.snapshot.memory, bench.directory / "memory.sock", window=1) as server:
        kit = bench.kit(backend="uffd", memory_socket=server.socket)
        with Loaded(kit, "recorded", bench.layout.vms / "recorded") as clone:
            clone.wait()
            clone.resume()
            with Guest(clone.directory) as guest:
                guest.call(baremetal.CHECK, first=FIRST, count=USED, seed=1, order=ORDER)
            working_set.save(bench.snapshot, server.used(clone.firecracker.pid))


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def warm(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 22):
            pass


def fault_latency(bench: Bench) -> dict[str, Any]:
    """Time for a clone to read 64 MiB in order, by the size of the window that a fault brings in."""
    result = {}
    for window in (1, 4, 16, 64, 512):
        with MemoryServer(bench.snapshot.memory, bench.directory / "memory.sock", window=window) as server:
            kit = bench.kit(backend="uffd", memory_socket=server.socket)
            times = []
            for number in bench.repeat(5):
                with Loaded(kit, f"w{window}-{number}", bench.layout.vms / f"w{window}-{number}") as clone:
                    clone.wait()
                    clone.resume()
                    with Guest(clone.directory) as guest:
                        start = now()
                        guest.call(baremetal.CHECK, first=FIRST, count=PAGES, seed=1, order=ORDER)
                        times.append(now() - start)
        result[f"{window * 4} KiB"] = summary(times)
    times = []
    for number in bench.repeat(5):
        with Loaded(bench.kit(), f"f{number}", bench.layout.vms / f"f{number}") as clone:
            clone.wait()
            clone.resume()
            with Guest(clone.directory) as guest:
                start = now()
                guest.call(baremetal.CHECK, first=FIRST, count=PAGES, seed=1, order=ORDER)
                times.append(now() - start)
    result["file"] = summary(times)
    return result


MEASUREMENTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "pooled clone, request to resumed": pooled_resume,
    "pooled clone, request to first answer": pooled_answer,
    "direct clone, to resumed": direct,
    "50 clones together": together,
    "memory per clone": memory,
    "restore to first answer": first_answer,
    "64 MiB by faults": fault_latency,
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a fifth of the repetitions")
    parser.add_argument("--directory", type=Path, help="where snapshots and VMs go (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--only", help="only measurements whose name contains this")
    args = parser.parse_args(arguments)
    gc.disable()
    with tempfile.TemporaryDirectory(prefix="fcvm-bench-", dir=args.directory) as name:
        bench = Bench(Path(name), args.quick)
        results: dict[str, Any] = {"machine": machine()}
        show("machine", results["machine"])
        for title, measure in MEASUREMENTS.items():
            if args.only is None or args.only in title:
                results[title] = measure(bench)
                show(title, results[title])
                gc.collect()
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if threading.active_count() > 1:
        raise RuntimeError("something still runs")


if __name__ == "__main__":
    main(sys.argv[1:])
