"""The inside of ``agent_guest.py``: makes an image and becomes the agent. Runs with the guest image's Python."""

import functools
import io
import os
import socket
import subprocess
import sys
import tarfile
import time

sys.path.insert(0, "/run/src")
os.environ.update(PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", HOME="/root")
os.environ["CONTAINERS_CONF_OVERRIDE"] = "/run/override.conf"

from fc_agent import init, linux, volumes
from fc_agent.agent import Agent
from fc_agent.podman import Service

CHANGES = ("ENV FROM_IMAGE=yes", 'CMD ["/bin/sh", "-c", "echo the image says so"]', "STOPSIGNAL SIGUSR1")
# Of a second image, localhost/own, which sets all that a run may leave to it
OWN = (
    r'ENTRYPOINT ["/bin/sh", "-c", "pwd; id -un; echo \"$@\"; cat", "own"]', 'CMD ["one", "two"]', "USER app", "WORKDIR /home/app",
    "ENV HOSTNAME=0.0.0.0",
)  # fmt: skip


def images() -> None:
    """A root file system with busybox, as Podman's only images."""

    def add(name: str, content: bytes = b"", mode: int = 0o644, kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode, entry.type, entry.linkname = len(content), mode, kind, link
        archive.addfile(entry, io.BytesIO(content))

    with tarfile.open("/run/bb.tar", "w") as archive:
        for name in ("bin", "etc", "tmp", "home", "home/app"):
            add(name, kind=tarfile.DIRTYPE, mode=0o1777 if name == "tmp" else 0o755)
        with open("/usr/bin/busybox", "rb") as file:
            add("bin/busybox", file.read(), 0o755)
        listed = subprocess.run(["/usr/bin/busybox", "--list"], capture_output=True, text=True, check=True)
        for name in listed.stdout.split():
            if name != "busybox":
                add(f"bin/{name}", kind=tarfile.SYMTYPE, link="busybox")
        add("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n")
        add("etc/group", b"root:x:0:\napp:x:1000:\nextra:x:2000:app\n")
    for name, lines in (("localhost/bb", CHANGES), ("localhost/own", OWN)):
        changes = [word for line in lines for word in ("--change", line)]
        subprocess.run(["podman", "import", "-q", *changes, "/run/bb.tar", name], check=True)


def connect(name: str = "control") -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(f"/run/test/{name}")
    except OSError:
        connection.close()
        raise
    return connection


def listen() -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("/run/test/sessions")
    listener.listen(200)
    return listener


def keep(*_: object) -> None:
    """What is the host's own stays as it is: its clock, its randomness."""


def main() -> None:
    if child := os.fork():
        while os.wait()[0] != child:  # PID 1 reaps
            pass
        sys.exit("the agent ended")
    init.loopback_up()
    linux.add_entropy = keep
    time.clock_settime_ns = keep
    volumes._connector = lambda port: functools.partial(connect, f"volume-{port}")
    service = Service()
    images()
    Agent(service, connect=connect, listen=listen).run()


main()
