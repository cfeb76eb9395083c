"""slirp4netns: a TCP/IP stack in user space that gives a namespace the host's network without any rights.

Its life is bound to a pipe of ours (``--exit-fd``), which the kernel closes with us. PR_SET_PDEATHSIG would bind it to the
thread that started it, and is lost when its sandbox changes credentials.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from ipaddress import IPv4Network
from pathlib import Path

from fc_agent.structs import Struct
from fcvm import hostpath, process
from fcvm.errors import NetworkError
from fcvm.linux import namespaces
from fcvm.linux.namespaces import Namespace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SOCKET = "slirp.sock"
MTU = 65520  # bytes; fewer, larger packets are what makes it fast
# where it places itself in its network
GATEWAY, ADDRESS = 2, 100
ADDRESS6, GATEWAY6 = "fd00::100/64", "fd00::2/64"
DIED = "slirp4netns died, and with it the VM's network."
_START = 10.0  # seconds
_ANSWER = 1 << 16


class Slirp(Struct):
    """A slirp4netns that is ready; ``pidfd`` becomes readable when it has died."""

    process: subprocess.Popen[bytes]
    pidfd: int
    directory: Path

    def forward(self, host_ip: str, host_port: int, guest_ip: str, guest_port: int) -> int:
        """Have it listen on the host, IPv4 and TCP only; returns what to ``forget``.

        For UDP, libslirp (4.7) remembers the client that was answered last in the socket that listens, and after a client
        from elsewhere those on the host's loopback are no longer understood.

        Raises:
            NetworkError: it refuses: the port is in use, say.
        """
        answer = self._request(
            "add_hostfwd",
            proto="tcp",
            host_addr=host_ip,
            host_port=host_port,
            guest_addr=guest_ip,
            guest_port=guest_port,
        )
        return int(answer["id"])

    def forget(self, number: int) -> None:
        """Have it listen there no more; nothing, if it is not there any more itself."""
        with suppress(NetworkError):
            self._request("remove_hostfwd", id=number)

    def _request(self, command: str, **arguments: Any) -> Any:
        """One request a connection, ended by shutting it down, as slirp4netns(1) has it."""
        where = os.open(self.directory, os.O_PATH | os.O_CLOEXEC)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(_START)
                # by way of the directory's fd: the path of a Unix socket has at most 107 bytes
                sock.connect(f"/proc/self/fd/{where}/{SOCKET}")
                sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
                sock.shutdown(socket.SHUT_WR)
                answer = b""
                while chunk := sock.recv(_ANSWER):
                    answer += chunk
        except OSError as error:
            raise NetworkError(f"slirp4netns does not answer: {error}.") from error
        finally:
            os.close(where)
        value = json.loads(answer or b"{}")
        if "return" not in value:
            reason = value.get("error", {}).get("desc", "no reason given")
            raise NetworkError(f"slirp4netns refused {command} of {arguments}: {reason}.")
        return value["return"]


@contextmanager
def slirp(namespace: Namespace, tap: str, network: IPv4Network, directory: Path, *, ipv6: bool) -> Iterator[Slirp]:
    """Attach a slirp4netns to ``tap`` of ``namespace``, until the block is left.

    Arguments:
        network: a /24 that nothing on the host has; it is ``GATEWAY`` in there and expects us to be ``ADDRESS``.
        directory: for its API socket.

    Raises:
        HostError: it is not installed.
        NetworkError: it does not start.
    """
    with ExitStack() as undo:
        ready, ready_write = os.pipe()
        exit_read, exit_write = os.pipe()
        complaints = os.memfd_create("slirp4netns", os.MFD_CLOEXEC)
        for fd in (ready, exit_write, complaints):
            undo.callback(os.close, fd)
        (directory / SOCKET).unlink(missing_ok=True)
        undo.callback((directory / SOCKET).unlink, missing_ok=True)
        command = ["slirp4netns", "--netns-type=path", f"--mtu={MTU}", f"--cidr={network}", f"--api-socket={SOCKET}"]
        command += ["--disable-host-loopback", "--disable-dns", "--enable-seccomp"]
        # The sandbox needs pivot_root(2), which the machine's root, on top of its initramfs, refuses. The machine is one
        # user's own, and its host stays out of reach.
        command += [] if hostpath.in_machine() else ["--enable-sandbox"]
        command += [f"--ready-fd={ready_write}", f"--exit-fd={exit_read}"]
        command += ["--enable-ipv6"] if ipv6 else []
        # Its sandbox is made for root, real or of a user namespace. So an ordinary user starts it inside the VM's, and
        # root outside, where it keeps the right to privileged ports, and only that.
        assert namespace.user is not None
        root = os.geteuid() == 0
        command += [f"--userns-path=/proc/self/fd/{namespace.user}"] if root else []
        try:
            child = process.spawn(
                [*command, f"/proc/self/fd/{namespace.net}", tap],
                cwd=directory,
                stderr=complaints,
                bound=False,
                pass_fds=(ready_write, exit_read, namespace.user, namespace.net),
                setup=None if root else partial(namespaces.setns, namespace.user, namespaces.CLONE_NEWUSER),
            )
        finally:
            os.close(ready_write)
            os.close(exit_read)
        undo.callback(_end, child)
        pidfd = os.pidfd_open(child.pid)
        undo.callback(os.close, pidfd)
        poll = select.poll()
        poll.register(ready, select.POLLIN)
        if not poll.poll(_START * 1000) or not os.read(ready, 1):  # it is slow, or it has ended
            child.kill()
            said = os.pread(complaints, 2000, 0).decode(errors="replace").strip()
            raise NetworkError(f"slirp4netns did not start: {said or 'it says nothing'}.", hint="slirp4netns --version")
        yield Slirp(child, pidfd, directory)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
