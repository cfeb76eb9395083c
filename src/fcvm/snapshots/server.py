"""The clone server: `fcvm snapshot serve TAG`.

It keeps a pool of loaded clones of one snapshot (pool.py), gives them their memory if they use the uffd backend (memory.py),
and supervises those that were asked for, each in a thread of its own. A clone's life is tied to the connection of the
client that asked for it, so a client that is killed takes its clone with it; the server's own end ends them all.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fc_agent.structs import Struct
from fcvm import host, log
from fcvm.config import Config
from fcvm.errors import FcvmError
from fcvm.linux import descriptors, sockets
from fcvm.network import attach
from fcvm.network import spec as network_spec
from fcvm.network.attach import Network
from fcvm.setup import Assets
from fcvm.signals import STOPPING, handled
from fcvm.snapshots import manifest, page_faults, restore, servers, store, working_set
from fcvm.snapshots.memory import MemoryServer
from fcvm.snapshots.pool import Kit, Pool
from fcvm.snapshots.recording import Recorder
from fcvm.snapshots.served import Client, ClientSupervisor, Pooled
from fcvm.snapshots.store import Snapshot
from fcvm.storage.layout import Layout
from fcvm.vm import clone as clones
from fcvm.vm import network as networks
from fcvm.vm import rpc, state
from fcvm.vm.spec import RunSpec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fcvm.snapshots.pool import NetworkFactory
    from fcvm.snapshots.restore import Backend

REQUEST_TIME = 10.0  # seconds for a client to say what it wants


class Settings(Struct):
    """How a server serves.

    Attributes:
        minimum, maximum: of clones that are kept ready.
        prefetch: have the pages that a clone needs first there before it asks; what they are is recorded with uffd only.
        network: mode of the clones in the pool; None: that of the snapshot.
    """

    tag: str
    backend: Backend = "file"
    minimum: int = 1
    maximum: int = 16
    prefetch: bool = False
    network: str | None = None


class CloneServer:
    """Serves clones of a snapshot: ``run`` until ``stop``."""

    def __init__(self, settings: Settings, config: Config, assets: Assets) -> None:
        self.settings = settings
        self.config = config
        self.assets = assets
        self.layout = Layout(config.base_dir)
        self.clients: dict[Client, threading.Thread] = {}
        self.changed = threading.Condition()
        self.memory: MemoryServer | None = None
        self.recorder: Recorder | None = None
        self.stopping = False
        self.failure: Exception | None = None
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.waking = threading.RLock()  # a signal handler may stop us while its own thread does

    def stop(self) -> None:
        """End the clones and the server; from any thread or signal handler, also when it has ended."""
        self.stopping = True
        with self.waking:
            if self.wake >= 0:
                os.eventfd_write(self.wake, 1)

    def _deafen(self) -> None:
        with self.waking:
            wake, self.wake = self.wake, -1  # first: a signal handler may come in between
            os.close(wake)

    def living(self) -> int:
        """How many clones run for clients."""
        return len(self.clients)

    def run(self, *, ready: Callable[[], None] = lambda: None) -> None:
        """Serve; ``ready`` is called when clients can come.

        Raises:
            FcvmError: the snapshot is not there, or cannot be restored here; or it is stopped before it is ready.
        """
        settings = self.settings
        with contextlib.ExitStack() as stack:
            stack.callback(self._deafen)
            descriptors.allow_all()  # a clone takes about twenty
            state.sweep(self.layout)
            self.snapshot = stack.enter_context(store.use(self.layout, settings.tag))
            version = self.assets.firecracker_version
            manifest.check(settings.tag, self.snapshot.manifest, firecracker=version, host=manifest.this_host())
            spec = clones.spec_of(self.snapshot, name="clone", network=self._mode())
            self.mode = spec.network
            info = {
                "pid": os.getpid(),
                "tag": settings.tag,
                "backend": settings.backend,
                "network": self.mode,
                "created_at": time.time(),
            }
            directory = stack.enter_context(servers.registered(self.layout, info))
            listener = stack.enter_context(sockets.listen(directory / servers.SOCKET))
            kit = self._kit(stack, directory, spec)
            stack.enter_context(self._filled(kit, ready))
            stack.callback(self._end_clients)
            self._accept(listener)
            listener.close()  # who waits there, or comes now, hears that we are ending
        if self.failure is not None:
            raise self.failure

    def _mode(self) -> str:
        return self.settings.network or self.snapshot.manifest.network

    def _kit(self, stack: contextlib.ExitStack, directory: Path, spec: RunSpec) -> Kit:
        settings, snapshot = self.settings, self.snapshot
        recorded = working_set.path(snapshot)
        if settings.backend == "uffd":
            record = settings.prefetch and not recorded.exists()
            self.memory = stack.enter_context(
                MemoryServer(
                    snapshot.memory,
                    directory / servers.MEMORY_SOCKET,
                    working_set=recorded if settings.prefetch and recorded.exists() else None,
                    window=1 if record else page_faults.WINDOW,
                    on_failure=self._memory_failed,
                )
            )
            if record:
                self.recorder = Recorder(snapshot, self.memory)
        elif settings.prefetch:
            _read_ahead(snapshot)

        return Kit(
            snapshot=snapshot,
            firecracker=self.assets.firecracker,
            disks=restore.find_disks(snapshot, self.layout),
            backend=settings.backend,
            memory_socket=self.memory.socket if self.memory else None,
            dirty_tracking=not host.deep(),
            network=_network(spec),
            arguments=tuple(spec.firecracker_args),
        )

    @contextlib.contextmanager
    def _filled(self, kit: Kit, ready: Callable[[], None]) -> Iterator[None]:
        """A pool that is being filled inside the block, where the server can be asked and stopped already."""
        settings = self.settings

        def fill() -> None:
            try:
                self.pool.fill()
                ready()
            except Exception as error:
                self.failure = error
                self.stop()

        filler = threading.Thread(target=fill, name="filler")
        with Pool(kit, self.layout.vms, minimum=settings.minimum, maximum=settings.maximum) as self.pool:
            filler.start()
            try:
                yield
            finally:
                self.pool.close()  # which ends the filling
                filler.join()

    def _memory_failed(self, pid: int, message: str) -> None:
        log.error(f"a clone of {self.settings.tag} ends, its memory cannot be served: {message}")

    # ---- clients

    def _accept(self, listener: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            selector.register(self.wake, selectors.EVENT_READ)
            while not self.stopping:
                for key, _ in selector.select():
                    if key.fileobj is listener:
                        self._welcome(listener)

    def _welcome(self, listener: socket.socket) -> None:
        """Take a client, to whom a thread of its own listens."""
        try:
            connection, _ = listener.accept()
        except OSError as error:  # the client has gone already, or no descriptors are left, perhaps not for long
            log.error(f"a client could not be served: {error}")
            time.sleep(0.1)
            return
        connection.settimeout(REQUEST_TIME)
        try:
            threading.Thread(target=self._greet, args=(connection,), name="client").start()
        except RuntimeError as error:  # no threads left
            log.error(f"a client could not be served: {error}")
            servers.send(connection, {"error": f"The clone server cannot serve another client: {error}."})
            connection.close()

    def _greet(self, connection: socket.socket) -> None:
        """Read a client's request and carry it out: the thread of a clone's whole life."""
        try:
            request, fds, rest = servers.receive(connection)
        except (OSError, ValueError):
            connection.close()
            return
        connection.settimeout(None)
        client = Client(connection, request, fds, rest)
        try:
            if request.get("op") == "status":
                servers.send(connection, self.status())
            elif request.get("op") == "run":
                self._serve(client)
            elif request.get("op") == "stop":
                servers.send(connection, {"stopping": True})
                self.stop()
            else:
                servers.send(connection, {"error": "The clone server does not know this request."})
        finally:
            client.close()

    def _serve(self, client: Client) -> None:
        with self.changed:
            if self.stopping:
                servers.send(client.connection, {"error": "The clone server is ending.", "hint": "fcvm snapshot ls"})
                return
            self.clients[client] = threading.current_thread()
        try:
            end = self._end(client)
            with self.changed:  # who is told of the end does not see the clone in any list
                client.supervisor = None
            servers.send(client.connection, end)
        finally:
            with self.changed:
                del self.clients[client]
                self.changed.notify_all()

    def _end(self, client: Client) -> dict[str, Any]:
        """Run a clone; returns the message that says how it ended."""
        try:
            return {"exit": self._run(client)}
        except FcvmError as error:
            return rpc.failure(error)
        except Exception as error:
            log.error(f"a clone failed: {error!r}")
            return {"error": f"The clone server failed: {error}."}

    def _run(self, client: Client) -> int:
        """A clone from its request to its end."""
        request = client.request
        spec = clones.spec_of(
            self.snapshot,
            name=state.check_name(str(request.get("name") or f"clone-{state.new_id()[:8]}")),
            publish=list(request.get("publish", [])),
            network=request.get("network") or self.mode,
            remove=bool(request.get("remove", True)),
            log_prefix=request.get("log_prefix"),
            detach=True,  # its output is not the server's
        )
        with self._start(spec) as start, contextlib.ExitStack() as ends:

            def started() -> None:
                if self.recorder is not None:
                    ends.callback(self.recorder.watch(supervisor.firecracker.pid))
                client.started()

            supervisor = ClientSupervisor(spec, self.config, start, client, on_started=started)
            client.supervisor = supervisor
            unread = threading.Event()

            def carry() -> None:
                try:
                    supervisor.carry_streams()
                except BrokenPipeError:  # the client does not read any more: as with `podman run`, that ends the VM
                    if not client.dismissed:  # and it is not us who give its output up
                        unread.set()
                    supervisor.ask({"op": "kill"})

            streams = threading.Thread(target=carry, name="streams")
            listener = threading.Thread(target=client.listen, name="requests")
            try:
                streams.start()
                listener.start()
                if self.stopping:
                    supervisor.ask({"op": "kill"})
                code = supervisor.run()
            finally:
                supervisor.close()  # it has not begun if there were no threads
                client.dismiss()
                for thread in (streams, listener):
                    if thread.ident is not None:
                        thread.join()
            return 141 if unread.is_set() else code

    @contextlib.contextmanager
    def _start(self, spec: RunSpec) -> Iterator[Pooled]:
        """From the pool; a VM with another network than those in the pool is loaded for itself."""
        network_spec.parse(spec.network, spec.publish)  # whether they go together
        ready = spec.network == self.mode
        with self.pool.take() if ready else self.pool.make(_network(spec)) as clone:
            yield Pooled(clone, self.settings.tag)

    def _end_clients(self) -> None:
        """End the clones of all clients, and wait for that."""
        with self.changed:
            self.stopping = True
            for client in self.clients:
                if client.supervisor is not None:
                    client.supervisor.ask({"op": "kill"})
                client.dismiss()
            while self.clients:
                self.changed.wait()

    def status(self) -> dict[str, Any]:
        """What `fcvm snapshot ls` shows."""
        now = self.pool.status()
        with self.changed:
            supervisors = [c.supervisor for c in self.clients if c.supervisor is not None]
        return {
            "clones": [{"id": s.id, "name": s.spec.name} for s in supervisors],
            "ready": now.ready,
            "target": now.target,
            "taken": now.taken,
            "late": now.late,
            "faults": self.memory.served() if self.memory else None,
        }


def _network(spec: RunSpec) -> NetworkFactory:
    """Makes networks like that of ``spec``, its ports apart, which are published when a clone is taken."""

    def create(clone_id: str, place: Path) -> Network:
        wanted = network_spec.parse(spec.network, (), spec.forward_localhost, spec.dns)
        return attach.create(networks.placed(wanted), clone_id, place)

    return create


def _read_ahead(snapshot: Snapshot) -> None:
    """Have the kernel read the memory file, in the background: what was recorded of it, or all."""
    memory = page_faults.Memory(snapshot.memory)
    try:
        ranges = working_set.load(working_set.path(snapshot)) or page_faults.present(memory.data)
        memory.read_ahead(ranges)
    finally:
        memory.close()


def serve(
    settings: Settings, config: Config, assets: Assets, *, ready: Callable[[], None], say: Callable[[str], None]
) -> None:
    """Run a clone server in the main thread until a signal ends it.

    SIGTERM and SIGHUP end it and its clones. So does SIGINT, but when clones run it has to come twice.

    Arguments:
        ready: called when clients can come.
        say: shows a person a line.

    Raises:
        FcvmError: as ``CloneServer.run``.
    """
    server = CloneServer(settings, config, assets)
    asked = False

    def interrupted(number: int, frame: object) -> None:
        nonlocal asked
        if server.living() and not asked and number == signal.SIGINT:
            asked = True
            say(f"{server.living()} clones of {settings.tag} run; Ctrl-C again ends them, fcvm ls lists them.")
        else:
            server.stop()

    with handled(STOPPING, interrupted):
        server.run(ready=ready)
