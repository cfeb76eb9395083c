"""A guest without a VM, for tests: the guest image as the root of fresh namespaces, the agent in it over Unix sockets.

Started as ``python agent_guest.py ROOT_IMAGE DIRECTORY`` inside ``unshare`` (mount, pid, uts, ipc, net); ``DIRECTORY`` gets the
sockets. It has two images of busybox, localhost/bb and localhost/own. Everything is gone when its process ends.
"""

import os
import subprocess
import sys


def main(root_image: str, directory: str) -> None:
    """Set the root up and become the agent."""

    def mount(*words: str) -> None:
        subprocess.run(["mount", *words], check=True)

    base = f"{directory}/root"
    for name in ("lower", "upper", "merged"):
        os.makedirs(f"{base}/{name}", exist_ok=True)
    mount("-t", "erofs", "-o", "loop,ro", root_image, f"{base}/lower")
    mount("-t", "tmpfs", "tmpfs", f"{base}/upper")
    for name in ("data", "work", "containers"):
        os.makedirs(f"{base}/upper/{name}")
    merged = f"{base}/merged"
    mount(
        "-t",
        "overlay",
        "-o",
        f"lowerdir={base}/lower,upperdir={base}/upper/data,workdir={base}/upper/work",
        "overlay",
        merged,
    )
    mount("--bind", f"{base}/upper/containers", f"{merged}/var/lib/containers")
    mount("-t", "proc", "proc", f"{merged}/proc")
    mount("-t", "sysfs", "sysfs", f"{merged}/sys")
    mount("-t", "cgroup2", "cgroup2", f"{merged}/sys/fs/cgroup")
    mount("-t", "tmpfs", "tmpfs", f"{merged}/run")
    mount("-t", "tmpfs", "tmpfs", f"{merged}/tmp")
    mount("--rbind", "/dev", f"{merged}/dev")
    os.makedirs(f"{merged}/dev/pts", exist_ok=True)
    mount("-t", "devpts", "-o", "newinstance,gid=5,mode=620,ptmxmode=666", "devpts", f"{merged}/dev/pts")
    for name in ("src", "test", "tests"):
        os.makedirs(f"{merged}/run/{name}")
    mount("--bind", os.path.join(os.path.dirname(__file__), "../../src"), f"{merged}/run/src")
    mount("--bind", os.path.dirname(__file__), f"{merged}/run/tests")
    mount("--bind", directory, f"{merged}/run/test")
    os.makedirs(f"{merged}/images", exist_ok=True)
    mount("-t", "tmpfs", "tmpfs", f"{merged}/images")
    with open(f"{merged}/run/override.conf", "w") as file:
        file.write("[containers]\npids_limit = 0\n")  # the host's cgroup v2 may have no controllers
    # Not chroot: whoever joins a mount namespace lands in the namespace's own root.
    os.chdir(merged)
    subprocess.run(["pivot_root", ".", "mnt"], check=True)
    os.chroot(".")
    subprocess.run(["umount", "-l", "/mnt"], check=True)
    mount("--make-rshared", "/")
    os.execv("/usr/bin/python3", ["python3", "-ISE", "/run/tests/agent_guest_inside.py"])


if __name__ == "__main__":
    main(*sys.argv[1:])
