"""What is measured on directories, whatever file systems they are on: large and small files, many workers, programs.

    python files.py NAME=DIRECTORY... [--sizes full|quick|emulated] [--rounds N]

Every case runs on every directory in turn, several times over, so that other load on the host hits all alike. Prints the
median rates as JSON: case -> NAME -> rate. The standard library only, and one module: guests run it too.
"""

import argparse
import functools
import io
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MIB = 1 << 20
WORKERS = 16

Case = Callable[[Path, "Sizes"], float]  # returns a rate: more is better


class Sizes(NamedTuple):
    """How much a run does: ``big`` MiB of one file, ``small`` files of 4 KiB, ``random`` reads and writes."""

    big: int
    small: int
    random: int


SIZES = {"full": Sizes(1024, 2000, 10_000), "quick": Sizes(64, 300, 1000), "emulated": Sizes(16, 50, 150)}


def timed(work: Callable[[], object], amount: float) -> float:
    start = time.perf_counter()
    work()
    return amount / (time.perf_counter() - start)


def write_big(path: Path, sizes: Sizes) -> float:
    block = os.urandom(MIB)

    def work() -> None:
        with (path / "big").open("wb", buffering=0) as file:
            for _ in range(sizes.big):
                file.write(block)

    return timed(work, sizes.big)


def forget(path: Path) -> None:
    """Drop what is cached of a file."""
    with path.open("r+b", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(file: io.FileIO, times: int = 1) -> None:
    buffer = memoryview(bytearray(MIB))
    for _ in range(times):
        file.seek(0)
        while file.readinto(buffer):
            pass


def read_big(path: Path, sizes: Sizes) -> float:
    forget(path / "big")
    with io.FileIO(path / "big") as file:
        return timed(lambda: read_all(file), sizes.big)


def read_again(path: Path, sizes: Sizes) -> float:
    times = 1024 // sizes.big
    with io.FileIO(path / "big") as file:
        read_all(file)
        return timed(lambda: read_all(file, times), times * sizes.big)


def offsets(sizes: Sizes) -> list[int]:
    chosen = random.Random(1)
    return [chosen.randrange(sizes.big * MIB // 4096) * 4096 for _ in range(sizes.random)]


def random_read(path: Path, sizes: Sizes) -> float:
    forget(path / "big")
    with (path / "big").open("rb", buffering=0) as file:
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


def look(path: Path, count: int, times: int = 1) -> None:
    for n in range(count * times):
        os.stat(path / f"f{n % count}")


def look_again(path: Path, sizes: Sizes) -> float:
    times = 20
    look(path / "small", sizes.small)
    return timed(lambda: look(path / "small", sizes.small, times), times * sizes.small)


def open_read(path: Path, count: int) -> None:
    for n in range(count):
        fd = os.open(path / f"f{n}", os.O_RDONLY)
        os.read(fd, 4096)
        os.close(fd)


def unlink(path: Path, count: int) -> None:
    for n in range(count):
        os.unlink(path / f"f{n}")


def single(work: Callable[[Path, int], None]) -> Case:
    def case(path: Path, sizes: Sizes) -> float:
        (path / "small").mkdir(exist_ok=True)
        return timed(lambda: work(path / "small", sizes.small), sizes.small)

    return case


def many(work: Callable[[Path, int], None]) -> Case:
    def case(path: Path, sizes: Sizes) -> float:
        each = max(sizes.small // WORKERS, 5)
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


@functools.cache
def archive(count: int) -> bytes:
    """A tar archive of so many files of up to 16 KiB, like the headers of a kernel."""
    chosen = random.Random(1)
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for n in range(count):
            text = b"#define NAME 0x0123456789abcdef\n" * chosen.randrange(1, 512)
            member = tarfile.TarInfo(f"tree/{n % 20}/{n}.h")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return made.getvalue()


def program(*command: str, reads_archive: bool = False) -> Case:
    """Runs a program in the directory."""

    def case(path: Path, sizes: Sizes) -> float:
        data = archive(sizes.small) if reads_archive else b""

        def work() -> None:
            subprocess.run(
                command, cwd=path, check=True, input=data, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )

        return timed(work, 1)

    return case


Cases = dict[str, tuple[str, Case]]  # name -> unit and case

CASES: Cases = {
    "write 1 MiB blocks": ("MiB/s", write_big),
    "read 1 MiB blocks": ("MiB/s", read_big),
    "read again, cached": ("MiB/s", read_again),
    "random 4 KiB read": ("/s", random_read),
    "random 4 KiB write": ("/s", random_write),
    "create+write+close": ("/s", single(create)),
    "stat": ("/s", single(look)),
    "stat again, cached": ("/s", look_again),
    "open+read+close": ("/s", single(open_read)),
    "unlink": ("/s", single(unlink)),
    "create, 16 workers": ("/s", many(create)),
    "stat, 16 workers": ("/s", many(look)),
    "open, 16 workers": ("/s", many(open_read)),
    "unlink, 16 workers": ("/s", many(unlink)),
    "untar": ("/s", program("tar", "-x", reads_archive=True)),
    "grep -r": ("/s", program("grep", "-rc", "define", "tree")),
    "rm -r": ("/s", program("rm", "-rf", "tree", "big", *(f"small{n}" for n in range(WORKERS)))),
}


def measure(cases: Cases, found: dict[str, Path], sizes: Sizes, rounds: int) -> dict[str, dict[str, float]]:
    """Case -> target -> median rate."""
    rates: dict[str, dict[str, list[float]]] = {name: {target: [] for target in found} for name in cases}
    for n in range(rounds):
        for name, (_, case) in cases.items():
            for target in sorted(found, key=lambda target: hash((n, target))):
                (found[target] / "work").mkdir(exist_ok=True)
                rates[name][target].append(case(found[target] / "work", sizes))
            if sys.stderr.isatty():
                print(f"\rround {n + 1} of {rounds}: {name:<22}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r" + " " * 50 + "\r", end="", file=sys.stderr)
    return {name: {target: statistics.median(values) for target, values in by.items()} for name, by in rates.items()}


def report(cases: Cases, results: dict[str, dict[str, float]], ours: str) -> list[dict[str, object]]:
    """One object for each case: its unit, the rates, and our time as a multiple of each other's."""
    return [
        {
            "case": name,
            "unit": cases[name][0],
            "rates": by,
            "times_of": {target: rate / by[ours] for target, rate in by.items() if target != ours},
        }
        for name, by in results.items()
    ]


def show(cases: Cases, results: dict[str, dict[str, float]], ours: str) -> None:
    """The same as a table."""
    targets = list(next(iter(results.values())))
    others = [target for target in targets if target != ours]
    print(f"{'':<22}" + "".join(f"{target:>16}" for target in targets) + "".join(f"{'of ' + t:>19}" for t in others))
    for name, by in results.items():
        row = f"{name:<22}" + "".join(f"{rate:>10.4g} {cases[name][0]:<5}" for rate in by.values())
        print(row + "".join(f"{by[t] / by[ours]:>18.2f}x" for t in others))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", metavar="NAME=DIRECTORY")
    parser.add_argument("--sizes", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found = {name: Path(directory) for name, _, directory in (word.partition("=") for word in args.directories)}
    print(json.dumps(measure(CASES, found, SIZES[args.sizes], args.rounds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
