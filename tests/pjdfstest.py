"""pjdfstest on a new directory, with relay and server between: on a mount here, or with ``--guest`` mapped into a VM.

    tests/pjdfstest.py [--guest] [--jobs N] DIR [TEST...]

DIR has the built suite, for a guest linked statically (``make CFLAGS="-O2 -static"``); TEST is a file or directory of it.
`prove` runs the tests. Those in a guest run in the guest OS; there the suite's own functions start fewer processes, which
are most of what an emulated guest does. Needs root.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fuse_support

FCVM = [sys.executable, "-m", "fcvm"]
VOLUMES = "/run/fcvm/volumes"  # in the guest OS

UUID = "/proc/sys/kernel/random/uuid"

# In misc.sh: what becomes of it in a guest, where busybox runs it.
QUICKER = {
    """r=`${fstest} $* 2>/dev/null | tail -1`
	echo "${r}" | ${GREP} -Eq '^'${e}'$'
""": """r=`${fstest} $* 2>/dev/null`
	r="${r##*
}"
	[[ "${r}" =~ ^${e}$ ]]
""",
    """	echo "pjdfstest_`dd if=/dev/urandom bs=1k count=1 2>/dev/null | openssl md5 | awk '{print $NF}'`"
""": f"""	read -r name <{UUID}
	echo "pjdfstest_${{name}}"
""",
    """namepart="`dd if=/dev/urandom bs=64 count=1 2>/dev/null | openssl md5 | awk '{print $NF}'`"
""": f"""read -r namepart <{UUID}
""",
    """curlen=`printf "%s" "${name}" | wc -c`
""": """curlen=${#name}
""",
    """name=`echo "${name}" | cut -b -${len}`
""": """name="${name:0:${len}}"
""",
}


@contextlib.contextmanager
def on_mount(base: Path, suite: Path) -> Iterator[list[str]]:
    """Options of `prove` that run the tests in a mount of a new directory below ``base``."""
    with fuse_support.mount(base, patience=3 * 3600) as mounted:
        yield ["--exec", f"env --chdir={mounted.path} sh"]


@contextlib.contextmanager
def in_guest(base: Path, suite: Path) -> Iterator[list[str]]:
    """The same for a directory that is mapped into a guest, where ``suite`` is copied to the path that it has here."""
    misc = suite / "tests/misc.sh"
    text = misc.read_text()
    for slow, quick in QUICKER.items():
        assert slow in text
        text = text.replace(slow, quick)
    misc.write_text(text)
    volume, name = base / "host", f"pjdfstest-{os.getpid()}"
    volume.mkdir()
    maps = ["--map", f"{volume}:/volume", "--map", f"{suite}:/suite:ro"]
    subprocess.run(
        [*FCVM, "podman", "run", "-d", "--name", name, *maps, "localhost/fcvm-demo", "--", "sleep", "1000000"],
        check=True,
    )
    try:
        execute = [*FCVM, "exec", "--vm", "--workdir", f"{VOLUMES}/0", name, "--"]
        subprocess.run([*execute, "mkdir", "-p", suite.parent], check=True)
        subprocess.run([*execute, "cp", "-r", f"{VOLUMES}/1", suite], check=True)
        yield ["--exec", " ".join([*execute, "busybox", "sh"])]
    finally:
        subprocess.run([*FCVM, "stop", "-t", "0", name], check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guest", action="store_true")
    parser.add_argument("--jobs", "-j", type=int, default=1, metavar="N", help="files at a time (default: 1)")
    parser.add_argument("suite", type=Path, metavar="DIR")
    parser.add_argument("tests", nargs="*", default=["tests"], metavar="TEST")
    args = parser.parse_intermixed_args()
    with fuse_support.scratch() as base:
        suite = base / "pjdfstest"
        shutil.copytree(args.suite / "tests", suite / "tests")
        shutil.copy(args.suite / "pjdfstest", suite)
        with (suite / "tests/conf").open("a") as conf:
            conf.write("fs=EXT4\n")  # of file systems that it does not know by name it does not expect everything
        with (in_guest if args.guest else on_mount)(base, suite) as options:
            prove = ["prove", "-r", "--timer", "--failures", f"--jobs={args.jobs}", *options]
            return subprocess.run([*prove, *(suite / test for test in args.tests)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
