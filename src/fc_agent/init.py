"""PID 1: what an init system mounts and sets, then the agent as a child, then nothing but reaping.

The initrd has mounted / (an overlay), /dev, /proc, /sys, /run and /scratch.
"""

import os
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from fc_agent import linux

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "linux",
}
OPEN_FILES = 1 << 20  # what Podman gives its containers on a host, too


def main(agent: Callable[[], None]) -> NoReturn:
    """Set the system up, run ``agent`` in a child and reap; when the agent ends, so does the system."""
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    prepare()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # programs inherit what is ignored
            agent()
            status = 0
        except BaseException:
            import traceback  # slow to import

            traceback.print_exc()
        finally:
            os._exit(status)
    while True:
        pid, status = os.wait()
        if pid == child:
            linux.log(f"the agent ended ({os.waitstatus_to_exitcode(status)}); the system ends with it")
            linux.reboot()


def prepare() -> None:
    """Everything that programs expect of a running system."""
    quiet = linux.MS_NOSUID | linux.MS_NODEV
    for path in ("/dev/pts", "/dev/shm", "/dev/mqueue"):
        os.makedirs(path, exist_ok=True)
    linux.mount("devpts", "/dev/pts", "devpts", linux.MS_NOSUID | linux.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666")
    linux.mount("tmpfs", "/dev/shm", "tmpfs", quiet, "mode=1777")
    linux.mount("tmpfs", "/tmp", "tmpfs", quiet, "mode=1777")
    with suppress(OSError):  # a kernel may lack it
        linux.mount("mqueue", "/dev/mqueue", "mqueue", quiet | linux.MS_NOEXEC)
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        with suppress(FileExistsError):
            os.symlink(f"/proc/self/{target}", f"/dev/{name}")
    cgroups()
    linux.mount("none", "/", "none", linux.MS_SHARED | linux.MS_REC)  # as systemd does; containers expect it
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    with suppress(OSError):
        linux.write("/proc/self/oom_score_adj", "-1000")  # without us nobody could tell the host what happened
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the kernel's Ctrl-Alt-Del
    loopback_up()


def cgroups() -> None:
    """cgroup v2, with every controller handed down; the root may have no processes of its own then."""
    root = "/sys/fs/cgroup"
    linux.mount("cgroup2", root, "cgroup2", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC, "nsdelegate")
    os.makedirs(f"{root}/init", exist_ok=True)
    linux.write(f"{root}/init/cgroup.procs", str(os.getpid()))
    with open(f"{root}/cgroup.controllers") as file:
        controllers = file.read().split()
    with suppress(OSError):
        linux.write(f"{root}/cgroup.subtree_control", " ".join(f"+{name}" for name in controllers))


def loopback_up() -> None:
    """Bring ``lo`` up, with the addresses that the kernel gives it."""
    import fcntl
    import socket
    import struct

    siocsifflags, iff_up = 0x8914, 1  # <linux/sockios.h>, <linux/if.h>
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, siocsifflags, struct.pack("16sH14x", b"lo", iff_up))
