"""What the machine's PID 1 does to its operating system: modules, network, data disk, user, power off.

One function per thing, each raising ``Broken`` with one sentence when the machine cannot go on without it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import pwd
import signal
import socket
import struct
import time
from contextlib import suppress

from fc_agent import linux, nested
from fc_agent.protocol import LOOPBACK_PRIORITY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

MS_NOATIME = 1024  # <linux/mount.h>
MNT_DETACH = 2

# <linux/sockios.h>, <linux/if.h>, <linux/route.h>
SIOCADDRT, SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK = 0x890B, 0x8914, 0x8916, 0x891C
IFF_UP, RTF_UP, RTF_GATEWAY = 1, 1, 2

RB_POWER_OFF = 0x4321FEDC  # <linux/reboot.h>

# <linux/btrfs_tree.h>: the superblock and its first copy; the magic is at byte 64 of each.
BTRFS_SUPERBLOCKS = (64 << 10, 64 << 20)
BTRFS_MAGIC = b"_BHRfS_M"

_libc = ctypes.CDLL(None, use_errno=True)


class Broken(Exception):
    """The machine cannot start or go on, and why."""


class Program:
    """A program that was started; ``wait`` for its end before anything relies on what it does."""

    def __init__(self, argv: tuple[str, ...]) -> None:
        self._argv = argv
        self._output, write = os.pipe()
        with open(os.devnull) as null:
            actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate((null.fileno(), write, write))]
            self._pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions)
        os.close(write)

    def wait(self) -> str:
        """Wait for its end; returns what it printed. Raises Broken: it failed."""
        with open(self._output, "rb") as pipe:
            output = pipe.read().decode(errors="replace").strip()
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        if code != 0:
            raise Broken(f"`{' '.join(self._argv)}` failed with exit code {code}: {output}")
        return output


def start(*argv: str) -> Program:
    """Start a program."""
    return Program(argv)


def run(*argv: str) -> str:
    """Run a program to its end; returns what it printed. Raises Broken: it failed."""
    return start(*argv).wait()


def network(configuration: dict[str, Any]) -> None:
    """Bring up eth0 with its fixed address on QEMU's user network, and name the host."""
    socket.sethostname(configuration["hostname"])
    address = socket.inet_aton(configuration["address"])
    mask = struct.pack(">I", 0xFFFFFFFF << (32 - configuration["prefix"]) & 0xFFFFFFFF)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        _ioctl_address(control, SIOCSIFADDR, "eth0", address)
        _ioctl_address(control, SIOCSIFNETMASK, "eth0", mask)
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", b"eth0", IFF_UP))
        # struct rtentry of 64-bit Linux: destination, gateway and mask are struct sockaddr
        gateway = _sockaddr(socket.inet_aton(configuration["gateway"]))
        route = struct.pack("<Q16s16s16sH", 0, _sockaddr(bytes(4)), gateway, _sockaddr(bytes(4)), RTF_UP | RTF_GATEWAY)
        with suppress(FileExistsError):
            fcntl.ioctl(control, SIOCADDRT, route.ljust(120, b"\0"))
    linux.write("/etc/resolv.conf", f"nameserver {configuration['dns']}\n")
    linux.write("/etc/hosts", f"127.0.0.1 localhost {configuration['hostname']}\n::1 localhost\n")
    linux.write("/proc/sys/net/ipv4/ip_forward", "1")
    # A published port arrives on eth0, whatever address its listener has; see machine_ports.py.
    linux.write("/proc/sys/net/ipv4/conf/all/route_localnet", "1")


def start_firewall(configuration: dict[str, Any]) -> Program:
    """Have VMs reach no more of the host than they would without a machine; needs nf_tables.

    QEMU's gateway leads to the host's loopback, and this system's own addresses to ports that the user may have published on
    the host's loopback only. VMs reach published ports and other services of the host at the host's own addresses. Our own
    sockets for ``--forward-localhost`` are told by their priority (``fcvm/machine/inside.py``), which no packet carries.
    TCP is refused by a reset: an ICMP message does not end the connect(2) of a socket of this system's own, slirp4netns's.
    """
    gateway, priority = configuration["gateway"], LOOPBACK_PRIORITY
    return start("nft", f"""table ip machine {{
        chain refuse {{
            meta l4proto tcp reject with tcp reset
            reject
        }}
        chain prerouting {{
            type filter hook prerouting priority mangle
            iifname "fcvm*" fib daddr type local ct state new goto refuse
            iifname "fcvm*" ip daddr {gateway} ct state new goto refuse
        }}
        chain output {{
            type filter hook output priority mangle
            ip daddr != 127.0.0.0/8 fib daddr type local ct state new goto refuse
            ip daddr {gateway} meta priority != 0:{priority} ct state new goto refuse
        }}
    }}""")


def _ioctl_address(control: socket.socket, request: int, name: str, address: bytes) -> None:
    fcntl.ioctl(control, request, struct.pack("16s16s8x", name.encode(), _sockaddr(address)))


def _sockaddr(address: bytes) -> bytes:
    return struct.pack("<HH4s8x", socket.AF_INET, 0, address)


def devices() -> None:
    """Permissions that udev would give: /dev/kvm for group kvm, tun and fuse for everyone; KVM's setting for nested VMs."""
    if not os.path.exists("/dev/kvm"):
        raise Broken("the kernel has made no /dev/kvm: QEMU's CPU lacks SVM")
    linux.write("/sys/module/kvm/parameters/min_timer_period_us", str(nested.TIMER_PERIOD))
    for path in ("/dev/kvm", "/dev/net/tun", "/dev/fuse", "/dev/userfaultfd"):
        with suppress(FileNotFoundError):
            os.chmod(path, 0o666)


def data_disk(device: str, target: str, user: dict[str, Any] | None) -> None:
    """Mount the data disk, with a new btrfs if it has none, grown to the size of the disk.

    A disk whose mkfs was killed has no valid superblock and is made anew; one that has lost its superblock but not the
    copy is repaired. Raises Broken: it has a file system that cannot be mounted.
    """
    with open(device, "rb") as disk:
        main, copy = (_btrfs_at(disk.fileno(), offset) for offset in BTRFS_SUPERBLOCKS)
    if not main and copy:
        run("btrfs", "rescue", "super-recover", "-y", device)
    elif not main:
        run("mkfs.btrfs", "--quiet", "--force", "--metadata", "single", device)
    try:
        os.makedirs(target, exist_ok=True)
        linux.mount(device, target, "btrfs", MS_NOATIME, "discard=async")
    except OSError as error:
        raise Broken(f"the data disk cannot be mounted: {error.strerror}") from error
    run("btrfs", "filesystem", "resize", "max", target)
    if user:
        os.chown(target, user["uid"], user["gid"])


def _btrfs_at(disk: int, offset: int) -> bool:
    return os.pread(disk, 8, offset + 64) == BTRFS_MAGIC


def mount_host(tag: str, target: str) -> None:
    """Mount the host's root directory, shared by virtio-fs."""
    try:
        os.makedirs(target, exist_ok=True)
        linux.mount(tag, target, "virtiofs", linux.MS_NODEV | linux.MS_NOSUID)
    except OSError as error:
        raise Broken(f"the host's files cannot be mounted: {error.strerror}") from error


def add_user(user: dict[str, Any]) -> None:
    """An account like that of the host's user: same name and ids, subordinate ids for user namespaces."""
    name, uid, gid = user["name"], user["uid"], user["gid"]
    home = f"/home/{name}"
    try:  # the image has accounts of its own, and the host's user may be one of those
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        _append("/etc/passwd", f"{name}:x:{uid}:{gid}:{name}:{home}:/bin/bash\n")
        _append("/etc/group", f"{name}:x:{gid}:\n")
    for path in ("/etc/subuid", "/etc/subgid"):
        _append(path, f"{name}:100000:65536\n")
    for directory in (home, f"/run/user/{uid}"):
        os.makedirs(directory, exist_ok=True)
        os.chown(directory, uid, gid)
        os.chmod(directory, 0o700)


def set_clock(seconds: float) -> None:
    """Set the clock to the host's, unless it differs by less than a control message may take."""
    if abs(time.time() - seconds) > 0.1:
        time.clock_settime(time.CLOCK_REALTIME, seconds)


def end_all_processes(patience: float) -> None:
    """SIGTERM to every process but us, SIGKILL ``patience`` seconds later to those that are left; reap them."""
    deadline = time.monotonic() + patience
    os.kill(-1, signal.SIGTERM if patience else signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        left = deadline - time.monotonic()
        if left <= 0 or signal.sigtimedwait({signal.SIGCHLD}, left) is None:
            os.kill(-1, signal.SIGKILL)
            deadline = time.monotonic() + 1


def unmount(*targets: str) -> None:
    """Unmount, by force of a lazy unmount where something still uses the file system; then write everything out."""
    for target in targets:
        if _libc.umount2(target.encode(), 0):
            _libc.umount2(target.encode(), MNT_DETACH)
    os.sync()


def power_off() -> NoReturn:
    """End QEMU."""
    _libc.reboot(RB_POWER_OFF)
    raise SystemExit(1)


def _write(path: str, text: str, mode: int = 0o644) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with open(fd, "w") as file:
        file.write(text)


def _append(path: str, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)
