#!/usr/bin/env python3
"""Installs the Debian packages that fcvm needs, if any is missing: `tools/packages.py run` (or `run test`).

QEMU 10 is needed where there is no KVM. Debian 12 has it in its backports only: it is taken from there by way of a private
apt configuration made from the host's own mirror, so that the host's sources stay as they are.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from fcvm.setup import sources

GROUPS = {
    "run": [
        "btrfs-progs",
        "busybox-static",  # for examples/build
        "debian-archive-keyring",
        "e2fsprogs",
        "iproute2",
        "libnftables1",
        "mmdebstrap",
        "mount",
        "python3-venv",
        "skopeo",
        "slirp4netns",
        "uidmap",
        "util-linux",
        "zstd",
    ],
    "test": [
        "acl",
        "attr",
        "bindfs",
        "crun",
        "curl",
        "docker-registry",
        "erofs-utils",
        "fio",
        "fuse3",
        "gcc",
        "git",
        "iperf3",
        "iptables",
        "libc6-dev",
        "libfuse3-dev",
        "lz4",
        "nftables",
        "pkg-config",
        "podman",
        "rsync",
        "sqlite3",
        "stress-ng",
        "xz-utils",
    ],
}
QEMU = "qemu-system-x86"
QEMU_WANTED = 10
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def main() -> int:
    groups = sys.argv[1:] or ["run"]
    wanted = sorted({package for group in groups for package in GROUPS[group]})
    if shutil.which("dpkg-query") is None:
        print(f"This is no Debian; install what corresponds to: {' '.join(wanted)}", file=sys.stderr)
        return 0
    missing = sorted(set(wanted) - installed(wanted))
    if missing:
        print(f"Installing {' '.join(missing)}", file=sys.stderr)
        apt("update", check=False)  # a third party's archive that is down is not our business
        apt("install", *missing)
    if emulates() and qemu_version() < QEMU_WANTED:
        install_qemu()
    return 0


def installed(packages: list[str]) -> set[str]:
    """Those of ``packages`` that are installed."""
    command = ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Package}\n", *packages]
    listed = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return {package for status, package in map(str.split, listed.splitlines()) if status == "installed"}


def apt(action: str, *words: str, options: tuple[str, ...] = (), check: bool = True) -> None:
    sudo = [] if os.geteuid() == 0 else ["sudo"]
    install = ["-y", "--no-install-recommends"] if action == "install" else []
    command = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-oDPkg::Lock::Timeout=600", *options, action, *install, *words]
    subprocess.run(command, check=check)


def emulates() -> bool:
    """Whether VMs run in the machine, because the CPU has no virtualization."""
    return os.uname().machine == "x86_64" and not re.search(r"\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text())


def qemu_version() -> int:
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        return 0
    found = re.search(rb"version (\d+)", subprocess.run([program, "--version"], stdout=subprocess.PIPE).stdout)
    return int(found[1]) if found else 0


def install_qemu() -> None:
    """Install QEMU: from backports on Debian 12, else the release's own."""
    mirrors = sources.mirrors(sources.read())
    if codename() != "bookworm" or mirrors is None:
        apt("install", QEMU)
        return
    print("Installing QEMU 10 from bookworm-backports", file=sys.stderr)
    with tempfile.TemporaryDirectory() as directory:
        private = Path(directory)
        private.chmod(0o755)
        signed = f"[signed-by={KEYRING}] " if Path(KEYRING).exists() else ""
        lines = [*sources.lines(mirrors, "bookworm"), f"deb {mirrors.main} bookworm-backports main"]
        (private / "sources.list").write_text(
            "".join(line.replace("deb ", f"deb {signed}", 1) + "\n" for line in lines)
        )
        (private / "lists/partial").mkdir(parents=True)
        options = (
            f"-oDir::Etc::sourcelist={private}/sources.list",
            "-oDir::Etc::sourceparts=/dev/null",
            f"-oDir::State::lists={private}/lists",
            "-oAPT::Sandbox::User=root",
        )
        try:
            apt("update", options=options)
            apt("install", "-t", "bookworm-backports", QEMU, options=options)
        finally:
            if os.geteuid() != 0:  # apt has written there as root
                subprocess.run(["sudo", "rm", "-rf", str(private / "lists")], check=False)


def codename() -> str:
    found = re.search(r"^VERSION_CODENAME=(\S+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    return found[1] if found else ""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: `{' '.join(error.cmd)}` failed")
