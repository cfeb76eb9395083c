"""What a mapped directory costs: a local mount through relay and server, beside the directory itself and libfuse.

Native C file systems on libfuse stand beside it in the same run: libfuse's own example ``passthrough_ll`` where it can
be built (packages libfuse3-dev, gcc, pkg-config), and bindfs. QEMU's 9p and virtio-fs need a guest, so they are not
here. Every case runs on every directory in turn, several times over, so that other load on the host hits all alike; the
table has the medians and the ratios. Needs root.

    python -m bench.volumes [--quick] [--json FILE] [--dir DIR] [--channels N]
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXAMPLES = Path("/usr/share/doc/libfuse3-dev/examples")
MIB = 1 << 20
WORKERS = 16

Case = Callable[[Path, "Sizes"], float]


class Sizes:
    """How much a run does: ``big`` bytes of one file, ``count`` small files, ``random`` reads and writes."""

    def __init__(self, quick: bool) -> None:
        self.big = (64 if quick else 1024) * MIB
        self.count = 300 if quick else 2000
        self.random = 1000 if quick else 10_000


# ---- what is measured; every case returns its rate, more is better


def timed(work: Callable[[], object], amount: float) -> float:
    start = time.perf_counter()
    work()
    return amount / (time.perf_counter() - start)


def write_big(path: Path, sizes: Sizes) -> float:
    block = os.urandom(MIB)

    def work() -> None:
        with (path / "big").open("wb", buffering=0) as file:
            for _ in range(sizes.big // MIB):
                file.write(block)

    return timed(work, sizes.big / MIB)


def read_all(path: Path, *, cached: bool) -> int:
    total = 0
    buffer = memoryview(bytearray(MIB))
    with path.open("rb", buffering=0) as file:
        if not cached:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while count := file.readinto(buffer):
            total += count
    return total


def read_big(path: Path, sizes: Sizes) -> float:
    return timed(lambda: read_all(path / "big", cached=False), sizes.big / MIB)


def read_again(path: Path, sizes: Sizes) -> float:
    read_all(path / "big", cached=True)
    return timed(lambda: read_all(path / "big", cached=True), sizes.big / MIB)


def offsets(sizes: Sizes) -> list[int]:
    chosen = random.Random(1)
    return [chosen.randrange(sizes.big // 4096) * 4096 for _ in range(sizes.random)]


def random_read(path: Path, sizes: Sizes) -> float:
    with (path / "big").open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return timed(lambda: [os.pread(file.fileno(), 4096, at) for at in offsets(sizes)], sizes.random)


def random_write(path: Path, sizes: Sizes) -> float:
    block = os.urandom(4096)
    with (path / "big").open("r+b", buffering=0) as file:
        return timed(lambda: [os.pwrite(file.fileno(), block, at) for at in offsets(sizes)], sizes.random)


def create(path: Path, count: int) -> None:
    for n in range(count):
        fd = os.open(path / f"f{n}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.write(fd, b"x" * 4096)
        os.close(fd)


def look(path: Path, count: int) -> None:
    for n in range(count):
        os.stat(path / f"f{n}")


def open_read(path: Path, count: int) -> None:
    for n in range(count):
        fd = os.open(path / f"f{n}", os.O_RDONLY)
        os.read(fd, 4096)
        os.close(fd)


def unlink(path: Path, count: int) -> None:
    for n in range(count):
        os.unlink(path / f"f{n}")


def single(work: Callable[[Path, int], None], before: Callable[[Path, int], None] | None = None) -> Case:
    def case(path: Path, sizes: Sizes) -> float:
        (path / "small").mkdir(exist_ok=True)
        if before is not None:
            before(path / "small", sizes.count)
        return timed(lambda: work(path / "small", sizes.count), sizes.count)

    return case


def many(work: Callable[[Path, int], None]) -> Case:
    def case(path: Path, sizes: Sizes) -> float:
        each = max(sizes.count // WORKERS, 20)
        for n in range(WORKERS):
            (path / f"small{n}").mkdir(exist_ok=True)
        context = multiprocessing.get_context("fork")
        barrier = context.Barrier(WORKERS + 1)

        def worker(directory: Path) -> None:
            barrier.wait()
            work(directory, each)

        processes = [context.Process(target=worker, args=(path / f"small{n}",)) for n in range(WORKERS)]
        for process in processes:
            process.start()
        barrier.wait()

        def finish() -> None:
            for process in processes:
                process.join()

        return timed(finish, each * WORKERS)

    return case


def program(*command: str) -> Case:
    def case(path: Path, sizes: Sizes) -> float:
        return timed(
            lambda: subprocess.run(command, cwd=path, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
            1,
        )

    return case


CASES: dict[str, tuple[str, Case]] = {
    "write 1 MiB blocks": ("MiB/s", write_big),
    "read 1 MiB blocks": ("MiB/s", read_big),
    "read again, cached": ("MiB/s", read_again),
    "random 4 KiB read": ("/s", random_read),
    "random 4 KiB write": ("/s", random_write),
    "create+write+close": ("/s", single(create)),
    "stat": ("/s", single(look)),
    "open+read+close": ("/s", single(open_read)),
    "unlink": ("/s", single(unlink)),
    "create, 16 workers": ("/s", many(create)),
    "stat, 16 workers": ("/s", many(look)),
    "open, 16 workers": ("/s", many(open_read)),
    "unlink, 16 workers": ("/s", many(unlink)),
    "git clone": ("/s", program("git", "clone", "-q", "--no-hardlinks", str(ROOT), "clone")),
    "git status": ("/s", program("git", "-C", "clone", "status")),
    "untar headers": ("/s", program("tar", "-xf", "../../headers.tar")),
    "grep -r": ("/s", program("grep", "-rc", "define", "usr/include/linux")),
    "rm -r": ("/s", program("rm", "-rf", "clone", "usr", "big", *(f"small{n}" for n in range(WORKERS)))),
}


# ---- what it is measured on


def wait_mounted(path: Path, process: "subprocess.Popen[bytes] | None" = None) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if os.path.ismount(path):
            return
        if process is not None and process.poll():
            break
        pause.wait(0.01)
    raise RuntimeError(f"{path} was not mounted")


@contextlib.contextmanager
def ours(base: Path, source: Path, channels: int) -> Iterator[Path]:
    """Server and relay, each a process, over a Unix socket."""
    point, path = base / "mount-fuse_pipe", base / "socket"
    point.mkdir()
    run = [sys.executable, "-m", "fuse_pipe"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen([*run, "serve", source, "--socket", path], env=env) as server:
        try:
            pause = threading.Event()
            for _ in range(1000):
                with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(str(path))
                    break
                pause.wait(0.01)
            with subprocess.Popen([*run, "mount", path, point, "--channels", str(channels)], env=env) as relay:
                try:
                    wait_mounted(point, relay)
                    yield point
                finally:
                    subprocess.run(["umount", "-l", point], check=False)
                    relay.terminate()
        finally:
            server.terminate()


@contextlib.contextmanager
def external(base: Path, name: str, command: list[str], point: Path) -> Iterator[Path]:
    """Another FUSE file system, started by its command."""
    subprocess.run(command, check=True)
    try:
        wait_mounted(point)
        yield point
    finally:
        subprocess.run(["umount", "-l", point], check=False)


def passthrough(base: Path) -> Path | None:
    """libfuse's example, built; None where that is not possible."""
    source = EXAMPLES / "passthrough_ll.c"
    if not source.exists() or not shutil.which("gcc") or not shutil.which("pkg-config"):
        return None
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True, text=True, check=False)
    binary = base / "passthrough_ll"
    built = subprocess.run(
        ["gcc", "-O2", "-I", EXAMPLES, source, *flags.stdout.split(), "-o", binary], capture_output=True, check=False
    )
    return binary if built.returncode == 0 else None


def targets(stack: contextlib.ExitStack, base: Path, channels: int) -> dict[str, Path]:
    """Name -> directory to measure on, each with a directory of its own behind it."""

    def behind(name: str) -> Path:
        path = base / f"behind-{name}"
        path.mkdir()
        return path

    found = {"host": behind("host")}
    example = passthrough(base)
    if example is not None:
        point = base / "mount-passthrough_ll"
        point.mkdir()
        command = [str(example), "-o", f"source={behind('passthrough_ll')},allow_other", str(point)]
        found["passthrough_ll"] = stack.enter_context(external(base, "passthrough_ll", command, point))
    if shutil.which("bindfs"):
        point = base / "mount-bindfs"
        point.mkdir()
        found["bindfs"] = stack.enter_context(
            external(base, "bindfs", ["bindfs", str(behind("bindfs")), str(point)], point)
        )
    found["fuse_pipe"] = stack.enter_context(ours(base, behind("fuse_pipe"), channels))
    return found


def measure(found: dict[str, Path], sizes: Sizes, rounds: int) -> dict[str, dict[str, float]]:
    """Case -> target -> median rate."""
    rates: dict[str, dict[str, list[float]]] = {name: {target: [] for target in found} for name in CASES}
    for n in range(rounds):
        for name, (_, case) in CASES.items():
            for target in sorted(found, key=lambda target: hash((n, target))):
                (found[target] / "work").mkdir(exist_ok=True)
                rates[name][target].append(case(found[target] / "work", sizes))
            print(f"\rround {n + 1} of {rounds}: {name:<22}", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 50 + "\r", end="", file=sys.stderr)
    return {name: {target: statistics.median(values) for target, values in by.items()} for name, by in rates.items()}


def report(results: dict[str, dict[str, float]]) -> list[dict[str, object]]:
    """One object for each case: its unit, the rates, and fuse_pipe's time as a multiple of each other's."""
    return [
        {
            "case": name,
            "unit": CASES[name][0],
            "rates": by,
            "times_of": {target: rate / by["fuse_pipe"] for target, rate in by.items() if target != "fuse_pipe"},
        }
        for name, by in results.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small files and one round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rates, and the ratios to the others, here")
    parser.add_argument("--dir", help="where to work (default: the temporary directory)")
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    if os.geteuid() != 0:
        print("Mounting needs root.\nhint: sudo python -m bench.volumes", file=sys.stderr)
        return 125
    with tempfile.TemporaryDirectory(dir=args.dir) as temporary, contextlib.ExitStack() as stack:
        base = Path(temporary)
        subprocess.run(["tar", "-C", "/", "-cf", base / "headers.tar", "usr/include/linux"], check=True)
        found = targets(stack, base, args.channels)
        results = measure(found, Sizes(args.quick), args.rounds or (1 if args.quick else 3))
    if args.json:
        args.json.write_text(json.dumps(report(results), indent=1) + "\n")
    native = [target for target in found if target not in ("host", "fuse_pipe")]
    print(
        f"{'':<22}"
        + "".join(f"{target:>16}" for target in found)
        + f"{'of host':>10}"
        + "".join(f"{'of ' + t:>19}" for t in native)
    )
    for name, by in results.items():
        row = f"{name:<22}" + "".join(f"{rate:>10.4g} {CASES[name][0]:<5}" for rate in by.values())
        row += f"{by['fuse_pipe'] / by['host']:>9.2f}x" + "".join(f"{by['fuse_pipe'] / by[t]:>18.2f}x" for t in native)
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
