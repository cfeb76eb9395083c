"""PID 1 of the machine, the emulated host: makes a small Debian into a place where Firecracker runs.

The host's keeper (``fcvm/machine/keeper.py``) starts QEMU and holds the other end of the virtio-serial port
``fcvm.control``, over which JSON lines go both ways:

    machine: {"type":"phase","name":"modules"|"disk"|"ready"}      how far the start is
    machine: {"type":"broken","message":...}                       the start cannot go on
    machine: {"type":"publish","id":N,"protocol":"tcp","host_ip":...,"host_port":...,"port":...}
    machine: {"type":"unpublish","id":N}
    host:    {"type":"time","seconds":1700000000.5}                 set the clock
    host:    {"type":"published","id":N,"host_port":...} or with "error"
    host:    {"type":"shutdown"}                                   end every process, unmount, power off

Its configuration comes as an SMBIOS OEM string (type 11, SMBIOS specification 3.6, section 7.12), which needs no driver:
JSON with ``hostname``, ``address``, ``prefix``, ``gateway``, ``dns``, ``user``.
PID 1 forks the agent and reaps; when the agent ends, whatever the reason, the machine powers off.
"""

import json
import os
import select
import signal
import socket
import time
from typing import Any, NoReturn

from fc_agent import init, linux
from fc_agent import machine_system as system
from fc_agent.machine_ports import Ports

CONTROL_PORT = "fcvm.control"
DATA_DISK = "/dev/vdb"
DATA = "/mnt/fcvm-btrfs"
HOST = "/host"
HOST_TAG = "host"  # of the virtio-fs device
RUN = "/run/fcvm"
SESSION_PORT = 1024  # of virtio-vsock; the keeper connects to it

# Not loaded on demand: devices have no udev here, and /dev/kvm and /dev/net/tun exist only once their driver does.
# In two groups, as loading is mostly decompressing and linking, and there are two CPUs or more.
MODULES = (("btrfs", "loop", "veth", "bridge"), ("kvm_amd", "tun", "nf_tables"))
FIRST_CPU = 0  # for the kernel alone: QEMU spoils guests that run on it, see fcvm/machine/qemu.py
STOP_SECONDS = 20.0  # that VMs and commands have to end by SIGTERM when the machine is stopped


def main() -> NoReturn:
    """Be PID 1."""
    os.environ.clear()
    os.environ.update(init.ENVIRONMENT)
    os.sched_setaffinity(0, os.sched_getaffinity(0) - {FIRST_CPU})  # every process is a child of this one
    init.prepare()
    agent = os.fork()
    if agent == 0:
        os._exit(_agent())
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            break
        if pid == agent:
            code = os.waitstatus_to_exitcode(status)
            if code != 0:
                linux.log(f"the machine's agent ended with {code}")
            break
    linux.log("ending processes")
    system.end_all_processes(STOP_SECONDS if os.waitstatus_to_exitcode(status) == 0 else 0)
    linux.log("unmounting")
    system.unmount(HOST, DATA)
    linux.log("powering off")
    system.power_off()


def _agent() -> int:
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # programs inherit what is ignored
    control = Control()
    try:
        configuration = oem_configuration()
        os.environ["FCVM_BASE_DIR"] = DATA
        loading = [system.start("modprobe", "-a", *names) for names in MODULES]
        system.network(configuration)
        control.phase("modules")
        for program in loading:
            program.wait()
        firewall = system.start_firewall(configuration)
        system.devices()
        control.phase("disk")
        system.data_disk(DATA_DISK, DATA, configuration.get("user"))
        system.mount_host(HOST_TAG, HOST)
        user = configuration.get("user")
        if user:
            system.add_user(user)
        firewall.wait()
        os.makedirs(RUN, exist_ok=True)
        ports = Ports(f"{RUN}/ports.sock", control.send)
        sessions = Sessions()
        control.phase("ready")
        control.serve(ports, sessions)
    except system.Broken as error:
        linux.log(str(error))
        control.send({"type": "broken", "message": str(error)})
        control.drain()
    return 0


class Sessions:
    """The session server: a process of its own, so that nothing it does can stop the control channel, and replaceable."""

    def __init__(self) -> None:
        self._listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        self._listener.bind((socket.VMADDR_CID_ANY, SESSION_PORT))
        self._listener.listen(1024)
        self.start()

    def start(self) -> None:
        """Start it; ``ended`` becomes readable when it ends."""
        pid = os.fork()
        if pid == 0:
            from fc_agent import machine_commands, session

            # A command's life is bound to the host's process that asked for it: no grace.
            session.serve(self._listener, launcher=machine_commands.Commands(), default_grace=0)
            os._exit(1)
        self.ended = os.pidfd_open(pid)

    def restart(self) -> None:
        """Start it again after its end."""
        linux.log("the session server has ended; it starts again")
        os.waitid(os.P_PIDFD, self.ended, os.WEXITED)
        os.close(self.ended)
        self.start()


def oem_configuration() -> dict[str, Any]:
    """The JSON in the SMBIOS OEM string that starts with ``fcvm:``."""
    table = "/sys/firmware/dmi/entries/11-0/raw"
    try:
        with open(table, "rb") as raw:
            data = raw.read()
    except OSError as error:
        raise system.Broken(f"no configuration from the host: {error}") from error
    for string in data[data[1] :].split(b"\0"):
        if string.startswith(b"fcvm:"):
            return dict(json.loads(string[5:]))
    raise system.Broken("no configuration from the host in the SMBIOS OEM strings")


class Control:
    """Our end of the virtio-serial port to the keeper."""

    def __init__(self) -> None:
        self._fd = os.open(self._device(), os.O_RDWR | os.O_CLOEXEC)

    @staticmethod
    def _device() -> str:
        directory = "/sys/class/virtio-ports"
        for _ in range(1000):
            for name in os.listdir(directory) if os.path.isdir(directory) else ():
                with open(f"{directory}/{name}/name") as text:
                    if text.read().strip() == CONTROL_PORT:
                        return f"/dev/{name}"
            time.sleep(0.01)  # the driver learns a port's name in a message from the device; nothing to wait on
        raise SystemExit(f"fcvm: no virtio-serial port {CONTROL_PORT}")

    def phase(self, name: str) -> None:
        self.send({"type": "phase", "name": name, "uptime": linux.uptime()})

    def send(self, message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[os.write(self._fd, data) :]

    def drain(self) -> None:
        """Wait until the keeper has read everything: it answers ``broken`` with ``shutdown``."""
        os.read(self._fd, 4096)

    def serve(self, ports: Ports, sessions: Sessions) -> None:
        """Carry out the keeper's messages until it asks for shutdown."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(sessions.ended, select.POLLIN)
        ports.register(poll)
        buffer = b""
        while True:
            for fd, _ in poll.poll():
                if fd == sessions.ended:
                    poll.unregister(fd)
                    sessions.restart()
                    poll.register(sessions.ended, select.POLLIN)
                    continue
                if fd != self._fd:
                    ports.ready(fd)
                    continue
                data = os.read(self._fd, 65536)
                if not data:  # the keeper is gone, and QEMU is about to be
                    return
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    if message["type"] == "shutdown":
                        return
                    if message["type"] == "time":
                        system.set_clock(message["seconds"])
                    elif message["type"] == "published":
                        ports.answer(message)


if __name__ == "__main__":
    main()
