"""The machine of a data directory, as commands see it: start it if need be, stop it, tell how it is, remove it."""

import contextlib
import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import sys
from collections.abc import Iterator

from fc_agent.structs import Struct
from fcvm import process
from fcvm.config import Config
from fcvm.errors import HostError, MachineError
from fcvm.machine import state
from fcvm.machine.keeper import STOP_TIME, Job
from fcvm.machine.state import Places, State
from fcvm.machine.sync import SOURCES, Plan, plan, sync, synced
from fcvm.setup.assets import Assets
from fcvm.setup.progress import Progress, Step
from fcvm.storage.layout import Layout

KEEPER = "import sys; sys.path.insert(0, sys.argv.pop(1)); from fcvm.machine.keeper import main; sys.exit(main())"

# The machine needs some memory, and so does the host beside it.
LEAST_MEMORY = 1024
HOST_SHARE = 0.8

TITLES = {
    "preparing": "preparing its disk",
    "booting": "booting",
}


class Machine(Struct):
    """The machine of ``layout``'s data directory. ``assets`` are needed to start it, or to see whether it is up to date."""

    config: Config
    layout: Layout

    @property
    def places(self) -> Places:
        return Places.of(self.layout.base)

    @property
    def user(self) -> str | None:
        """Who commands run as in the machine: root for root, else the account with the same number."""
        return None if os.geteuid() == 0 else str(os.geteuid())

    def status(self) -> State:
        """How it is now."""
        return state.read(self.places)

    def ensure_started(self, assets: Assets, progress: Progress) -> None:
        """Start it if it does not run, wait if it is starting, and give it what VMs need.

        Raises:
            HostError: QEMU is missing or too old, no space, no permission.
            MachineError: it does not start; the message holds the end of its console.
        """
        places = self.places
        if state.read(places).phase != "running":
            with progress.step("Machine (emulated host)") as step:
                self._start(assets, step)
        self.renew(plan(assets, self.layout.base), progress)

    def renew(self, wanted: Plan, progress: Progress) -> None:
        """Give the running machine what it is to have, unless it has that. Raises MachineError: it could not be copied."""
        if not synced(self.places, wanted):
            with progress.step("Copying fcvm into the machine") as step:
                sync(self.places, wanted, self.user, step.note)

    def _start(self, assets: Assets, step: Step) -> None:
        places = self.places
        with _starting(places, step) as starting_fd:
            before = state.read(places)
            if before.phase == "running":  # another command was faster
                return
            if state.alive(places):  # on its way out
                _wait_for_end(places, before)
            read, write = os.pipe()
            try:
                self._spawn(assets, write, starting_fd)
            finally:
                os.close(write)
            with open(read, "rb") as messages:
                for line in messages:
                    message = json.loads(line)
                    if "error" in message:
                        raise MachineError(message["error"], hint=message["hint"])
                    step.note(TITLES.get(message["detail"], message["phase"]))
        if state.read(places).phase != "running":
            raise MachineError("The machine's keeper ended at its start.", hint="fcvm machine logs")

    def _spawn(self, assets: Assets, progress_fd: int, starting_fd: int) -> None:
        from fcvm.setup import kernel

        places = self.places
        places.make()  # again: a keeper that has just ended took the sockets' directory with it
        _remove_leftovers(places)
        state.write(places, State("starting"))
        job = Job(
            base=self.layout.base,
            cpus=self.config.machine_cpus,
            memory=memory(self.config),
            disk=self.config.machine_disk,
            kernel=assets.vmlinuz,
            initrd=assets.machine_initrd,
            root=assets.root_image,
            kernel_arguments=kernel.boot_args(emulated=True, role="machine"),
            boot=boot_key(self.config, assets),
            progress_fd=progress_fd,
            starting_fd=starting_fd,
        )
        places.keep_previous()
        with open(places.log, "wb") as log:
            process.spawn(
                [sys.executable, "-ISE", "-c", KEEPER, str(SOURCES), job.to_json()],
                stdout=log,
                stderr=log,
                cwd="/",
                pass_fds=(progress_fd, starting_fd),
                bound=False,
            ).wait()

    def outdated(self, assets: Assets) -> bool:
        """Whether it runs, but from another image, initrd or with other settings than a start would take now."""
        now = state.read(self.places)
        return now.phase == "running" and now.boot != boot_key(self.config, assets)

    def stop(self) -> bool:
        """End its processes, unmount its disk, power it off. Returns whether it was running."""
        now = state.read(self.places)
        if not state.alive(self.places):
            return False
        _wait_for_end(self.places, now, signal.SIGTERM)
        return True

    def remove(self) -> None:
        """Stop it and remove its disk and whatever else is left of it."""
        if not self.places.directory.exists():
            return
        self.stop()
        with _starting(self.places):
            self.stop()  # what was started in between
            _remove_leftovers(self.places)
            shutil.rmtree(self.places.directory)
            with contextlib.suppress(OSError):
                self.places.runtime.rmdir()


def memory(config: Config) -> int:
    """The machine's memory in MiB: the setting, or most of what the host has if that is less."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    most = int(host * HOST_SHARE)
    if most < LEAST_MEMORY:
        raise HostError(f"This host has {host} MiB of memory; the machine needs {LEAST_MEMORY} MiB beside the host's own.")
    return min(config.machine_mem, most)


def boot_key(config: Config, assets: Assets) -> str:
    """Identifies what a machine is started from and with."""
    parts = (assets.vmlinuz, assets.machine_initrd, assets.root_image, config.machine_cpus, memory(config), config.machine_disk)
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _starting(places: Places, step: Step | None = None) -> Iterator[int]:
    """Hold the lock under which machines are started and removed; yields its descriptor, which the keeper inherits and unlocks."""
    while True:
        places.make()  # again: it may have been removed while we waited
        fd = os.open(places.starting, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if step is not None:
                    step.note("being started by another command")
                fcntl.flock(fd, fcntl.LOCK_EX)
            if not os.fstat(fd).st_nlink:
                continue
            yield fd
            return
        finally:
            os.close(fd)


def _wait_for_end(places: Places, now: State, number: signal.Signals | None = None) -> None:
    """Wait until the keeper is gone, after a signal if there is one. Raises MachineError: it does not go."""
    if not now.pid:
        raise MachineError("The machine is being started; try again in a moment.", hint="fcvm machine status")
    try:
        keeper = os.pidfd_open(now.pid)
    except ProcessLookupError:
        return
    try:
        if number is not None and state.read(places).pid == now.pid:  # else it has ended, and the number is another's
            signal.pidfd_send_signal(keeper, number)
        if not select.select([keeper], [], [], STOP_TIME + 20)[0]:
            raise MachineError(f"The machine's keeper (process {now.pid}) does not end.", hint=f"kill -9 {now.pid}")
    finally:
        os.close(keeper)


def _remove_leftovers(places: Places) -> None:
    """Remove what a killed keeper has left; nothing of it is in use, as no keeper lives."""
    places.disk.with_suffix(".creating").unlink(missing_ok=True)
    if places.runtime.is_dir():
        for leftover in places.runtime.iterdir():
            leftover.unlink()
