"""What a mapped directory costs: a local mount through relay and server, beside the directory itself and libfuse.

Native C file systems on libfuse stand beside it in the same run: libfuse's own example ``passthrough_ll`` where it can
be built (packages libfuse3-dev, gcc, pkg-config), and bindfs. The table has the median rates (bench/files.py), and our
time as a multiple of each other's. In a guest: bench/volumes_guest.py. Needs root.

    python -m bench.volumes [--quick] [--json FILE] [--dir DIR] [--channels N]
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from bench import files

ROOT = Path(__file__).parent.parent
EXAMPLES = Path("/usr/share/doc/libfuse3-dev/examples")
GIT: files.Cases = {
    "git clone": ("/s", files.program("git", "clone", "-q", "--no-hardlinks", str(ROOT), "clone")),
    "git status": ("/s", files.program("git", "-C", "clone", "status")),
    "rm -r of the clone": ("/s", files.program("rm", "-rf", "clone")),
}


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
        found = targets(stack, base, args.channels)
        cases = {**files.CASES, **GIT}
        sizes = files.SIZES["quick" if args.quick else "full"]
        results = files.measure(cases, found, sizes, args.rounds or (1 if args.quick else 3))
    if args.json:
        args.json.write_text(json.dumps(files.report(cases, results, "fuse_pipe"), indent=1) + "\n")
    files.show(cases, results, "fuse_pipe")
    return 0


if __name__ == "__main__":
    sys.exit(main())
