"""A clone that a clone server supervises for one of its clients."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from fcvm.config import Config
from fcvm.firecracker.process import Firecracker
from fcvm.network.attach import Network
from fcvm.snapshots import servers, store
from fcvm.snapshots.pool import Loaded
from fcvm.vm import network as networks
from fcvm.vm import rpc
from fcvm.vm.output import Marks, Output, write_while
from fcvm.vm.spec import RunSpec
from fcvm.vm.start import Start
from fcvm.vm.supervisor import Supervisor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Pooled(Start):
    """A start that takes over a clone from the pool: see ``fcvm.vm.start.Start``."""

    clone: Loaded
    tag: str

    @property
    def snapshot(self) -> str | None:
        return self.tag

    def network(self, vm: Supervisor) -> AbstractContextManager[Network]:
        """The network that the clone has, with the ports of this VM. The clone ends with it, before the VM is said to have."""
        return self._network(vm)

    @contextlib.contextmanager
    def _network(self, vm: Supervisor) -> Iterator[Network]:
        with self.clone:
            network: Network = self.clone.network
            if vm.spec.publish:
                network.publish(networks.ports(vm))
            yield network

    def disks(self, vm: Supervisor) -> None:
        """They are there; the directory becomes the VM's."""
        self.clone.move(vm.directory)

    def volumes(self, vm: Supervisor) -> Path:
        """Those that the snapshot's VM had open."""
        return self.clone.kit.snapshot.path / store.VOLUMES

    def firecracker(self, vm: Supervisor) -> AbstractContextManager[Firecracker]:
        """That of the clone."""
        return self.clone.firecracker

    def go(self, vm: Supervisor) -> None:
        self.clone.resume()
        vm.timings.mark("resume")


class ClientOutput(Output):
    """Also writes to a client's stdout and stderr, as long as the client lives."""

    def __init__(self, kept: Output, client: Client, *, prefix: bool | None) -> None:
        self.__dict__.update(kept.__dict__)
        self.descriptors = client.descriptors
        self.connection = client.connection
        self.marks = Marks(prefix, client.fds)

    def write(self, stream: str, data: bytes) -> None:
        super().write(stream, data)
        if not self.closed and stream in self.descriptors:
            try:
                write_while(self.descriptors[stream], self.marks.put(stream, data), self.connection)
            except OSError as error:
                self.closed = True
                raise BrokenPipeError(*error.args) from error

    def end_lines(self, *, wait: bool = True) -> None:
        for stream in self.marks.unfinished() if not self.closed else ():
            with contextlib.suppress(OSError):
                if wait or select.select([], [self.descriptors[stream]], [], 0)[1]:
                    write_while(self.descriptors[stream], b"\n", self.connection)


class ClientSupervisor(Supervisor):
    """Supervises a clone for a client, whose process the VM is listed under."""

    def __init__(
        self, spec: RunSpec, config: Config, start: Pooled, client: Client, *, on_started: Callable[[], None]
    ) -> None:
        super().__init__(spec, config, start, on_started=on_started)
        self.client = client
        self.id = start.clone.id
        self.directory = self.layout.vms / self.id

    def _acquire(self, stack: contextlib.ExitStack) -> None:
        super()._acquire(stack)
        self.entry.update(pid=self.client.pid)
        self.output = ClientOutput(self.output, self.client, prefix=self.marked)


class Client:
    """One connection that asked for a clone.

    Attributes:
        detached: it has let go of its clone, which lives on without it.
        dismissed: we have let go of it.
    """

    def __init__(self, connection: socket.socket, request: dict[str, Any], fds: list[int], rest: bytes = b"") -> None:
        """``rest``: what came after the request."""
        self.connection = connection
        self.messages = servers.lines(connection, rest)
        self.request = request
        self.fds = fds
        self.descriptors = dict(zip(("stdout", "stderr"), fds, strict=False))
        self.pid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        self.dismissed = False
        self.detached = False  # not before the client, who may want all of a fleet or none, lets go of it
        self.supervisor: ClientSupervisor | None = None
        if request.get("detach"):
            self.pid = os.getpid()

    def started(self) -> None:
        """The clone runs and is itself."""
        assert self.supervisor is not None
        names = {"id": self.supervisor.id, "name": self.supervisor.spec.name}
        servers.send(self.connection, {"started": names})

    def listen(self) -> None:
        """Carry out what the client says, and its end."""
        for message in self.messages:
            if message.get("op") == "detach":
                self.detached = True
            elif self.supervisor is not None and message.get("op") in ("stop", "kill", "signal") and rpc.is_sound(message):
                self.supervisor.ask(message)
        if self.supervisor is not None and not self.detached:
            self.supervisor.ask({"op": "kill"})

    def dismiss(self) -> None:
        """Neither hear the client any more nor wait until it takes output; it can still be told how its clone has ended."""
        self.dismissed = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        self.connection.close()
        for fd in self.fds:
            os.close(fd)
