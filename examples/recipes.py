"""The demo images: what is in them and how they run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import archive
import packages
from archive import File, directory, symlink

from fcvm import process
from fcvm.config import Config

HERE = Path(__file__).parent
SECOND = 10**9  # Docker's durations are nanoseconds
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Recipe:
    """An image: ``packages`` from Debian, ``files`` of ours on top, ``config`` in Docker's words."""

    name: str
    packages: tuple[str, ...]
    files: Callable[[], list[File]]
    config: dict[str, Any]


def layers(recipe: Recipe, config: Config) -> list[bytes]:
    """The layers of the recipe's image: the packages' files, then ours."""
    below = [archive.layer(packages.files(list(recipe.packages), config))] if recipe.packages else []
    return [*below, archive.layer(recipe.files())]


def users(*accounts: tuple[str, int, str]) -> list[File]:
    """/etc/passwd and /etc/group with root, nobody and ``accounts`` (name, uid and gid, home)."""
    everyone = [("root", 0, "/root"), *accounts, ("nobody", 65534, "/nonexistent")]
    passwd = "".join(
        f"{name}:x:{id}:{id}::{home}:{'/bin/sh' if id == 0 else '/bin/false'}\n" for name, id, home in everyone
    )
    group = "".join(f"{name if name != 'nobody' else 'nogroup'}:x:{id}:\n" for name, id, _ in everyone)
    return [directory("etc"), File("etc/passwd", passwd.encode()), File("etc/group", group.encode())]


def demo_files() -> list[File]:
    """busybox under all its names, some users, a page for its httpd."""
    busybox = packages.busybox()
    applets = process.run([busybox, "--list"]).stdout.decode().split()
    return [
        *(directory(name) for name in ("bin", "dev", "proc", "sys", "run", "usr", "var", "www")),
        directory("tmp", 0o1777),
        directory("root", 0o700),
        directory("home"),
        directory("home/demo", 0o755, 1000, 1000),
        File("bin/busybox", busybox.read_bytes(), 0o755),
        *(symlink(f"bin/{applet}", "busybox") for applet in sorted(set(applets) - {"busybox"})),
        *users(("demo", 1000, "/home/demo"), ("www-data", 33, "/www")),
        File("etc/hosts", b"127.0.0.1 localhost\n"),
        File("www/index.html", (HERE / "demo/index.html").read_bytes()),
    ]


def nginx_files() -> list[File]:
    """A configuration without Debian's machinery of sites, logs to the container's output, busybox for the health check."""
    return [
        *users(("www-data", 33, "/var/www")),
        File("etc/nginx/nginx.conf", (HERE / "nginx/nginx.conf").read_bytes()),
        directory("var/www"),
        File("var/www/index.html", (HERE / "nginx/index.html").read_bytes()),
        directory("var/log/nginx"),
        symlink("var/log/nginx/access.log", "/dev/stdout"),
        symlink("var/log/nginx/error.log", "/dev/stderr"),
        directory("run"),
        directory("tmp", 0o1777),
        directory("root", 0o700),
        directory("proc"),
        directory("sys"),
        directory("dev"),
        File("usr/bin/busybox", packages.busybox().read_bytes(), 0o755),
        symlink("usr/bin/sh", "busybox"),
    ]


def redis_files() -> list[File]:
    """A configuration for the network, and a data directory of the user redis."""
    return [
        *users(("redis", 999, "/data")),
        directory("etc/redis", 0o755),
        File("etc/redis/fcvm.conf", (HERE / "redis/redis.conf").read_bytes()),
        directory("data", 0o755, 999, 999),
        directory("run"),
        directory("tmp", 0o1777),
        directory("root", 0o700),
        directory("proc"),
        directory("sys"),
        directory("dev"),
        File("usr/bin/busybox", packages.busybox().read_bytes(), 0o755),
        symlink("usr/bin/sh", "busybox"),
    ]


def iperf_files() -> list[File]:
    """Where a server of iperf3 finds what it writes to."""
    return [*users(), *(directory(name) for name in ("run", "proc", "sys", "dev")), directory("tmp", 0o1777), directory("root", 0o700)]


RECIPES = {
    "demo": Recipe(
        "localhost/fcvm-demo:latest",
        (),
        demo_files,
        {"Env": ["PATH=/bin"], "Cmd": ["sh"], "WorkingDir": "/root", "Labels": {"org.opencontainers.image.title": "fcvm demo"}},
    ),
    "nginx": Recipe(
        "localhost/fcvm-nginx:latest",
        ("nginx",),
        nginx_files,
        {
            "Env": [PATH],
            "Cmd": ["nginx", "-g", "daemon off;"],
            "ExposedPorts": {"80/tcp": {}},
            "StopSignal": "SIGQUIT",  # serve what is under way, then stop
            "Healthcheck": {
                "Test": ["CMD", "busybox", "wget", "-q", "-O", "/dev/null", "http://127.0.0.1/"],
                "Interval": 30 * SECOND, "Timeout": 5 * SECOND, "StartPeriod": 30 * SECOND, "Retries": 3,
            },
        },
    ),
    "redis": Recipe(
        "localhost/fcvm-redis:latest",
        ("redis-server", "redis-tools"),
        redis_files,
        {
            "Env": [PATH],
            "Entrypoint": ["redis-server"],
            "Cmd": ["/etc/redis/fcvm.conf"],
            "User": "redis",
            "WorkingDir": "/data",
            "ExposedPorts": {"6379/tcp": {}},
            "Healthcheck": {
                "Test": ["CMD", "redis-cli", "ping"],
                "Interval": 30 * SECOND, "Timeout": 5 * SECOND, "StartPeriod": 30 * SECOND, "Retries": 3,
            },
        },
    ),
    "iperf": Recipe(
        "localhost/fcvm-iperf:latest",
        ("iperf3",),
        iperf_files,
        {"Env": [PATH], "Entrypoint": ["iperf3"], "Cmd": ["-s"], "ExposedPorts": {"5201/tcp": {}}},
    ),
}  # fmt: skip
