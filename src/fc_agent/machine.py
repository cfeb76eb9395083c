"""PID 1 of the machine, the emulated host: makes a small Debian into a place where Firecracker runs.

The host's keeper (``fcvm/machine/keeper.py``) starts QEMU and holds the other end of the virtio-serial port
``fcvm.control``, over which JSON lines go both ways:

    machine: {"type":"phase","name":"network"|"disk"|"ready"}      how far the start is
    machine: {"type":"broken","message":...}                       the start cannot go on
    machine: {"type":"publish","id":N,"protocol":"tcp","host_ip":...,"host_port":...,"port":...}
    machine: {"type":"unpublish","id":N}
    host:    {"type":"time","seconds":1700000000.5}                 set the clock
    host:    {"type":"published","id":N,"host_port":...} or with "error"
    host:    {"type":"shutdown"}                                   end every process, unmount, power off

Its configuration comes as an SMBIOS OEM string (type 11, SMBIOS specification 3.6, section 7.12), which needs no driver:
JSON with ``hostname``, ``address``, ``prefix``, ``gateway``, ``dns``, ``authorized_key``, ``host_key``, ``user``.
PID 1 forks the agent and reaps; when the agent ends, whatever the reason, the machine powers off.
"""

import json
import os
import socket
import time
from typing import Any, NoReturn

from fc_agent import machine_system as system
from fc_agent.machine_ports import Ports

CONTROL_PORT = "fcvm.control"
DATA_DISK = "/dev/vdb"
DATA = "/mnt/fcvm-btrfs"
HOST = "/host"
HOST_TAG = "host"  # of the virtio-fs device
RUN = "/run/fcvm"
SESSION_SOCKET = f"{RUN}/session.sock"

# Not loaded on demand: devices have no udev here, and /dev/kvm and /dev/net/tun exist only once their driver does.
MODULES = ("virtio_net", "virtio_rng", "virtio_balloon", "btrfs", "kvm_amd", "tun", "loop", "veth", "bridge", "nf_tables")
STOP_SECONDS = 20.0  # that VMs and commands have to end by SIGTERM when the machine is stopped


def main() -> NoReturn:
    """Be PID 1."""
    system.mounts()
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
                print(f"fcvm: the machine's agent ended with {code}", flush=True)
            break
    system.end_all_processes(STOP_SECONDS if os.waitstatus_to_exitcode(status) == 0 else 0)
    system.unmount(HOST, DATA)
    system.power_off()


def _agent() -> int:
    os.setsid()
    os.environ.update(PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", HOME="/root", LANG="C.UTF-8")
    control = Control()
    try:
        configuration = oem_configuration()
        os.environ["FCVM_BASE_DIR"] = DATA
        system.run("modprobe", "-a", *MODULES)
        control.phase("network")
        system.network(configuration)
        system.devices()
        control.phase("disk")
        system.data_disk(DATA_DISK, DATA, configuration.get("user"))
        system.mount_host(HOST_TAG, HOST)
        user = configuration.get("user")
        if user:
            system.add_user(user)
        system.start_sshd(configuration)
        os.makedirs(RUN, exist_ok=True)
        ports = Ports(f"{RUN}/ports.sock", control.send)
        _start_sessions()
        control.phase("ready")
        control.serve(ports)
    except system.Broken as error:
        print(f"fcvm: {error}", flush=True)
        control.send({"type": "broken", "message": str(error)})
        control.drain()
    return 0


def _start_sessions() -> None:
    """Serve sessions in a process of their own, so that nothing they do can stop the control channel."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(SESSION_SOCKET)
    listener.listen(1024)
    if os.fork() == 0:
        from fc_agent import machine_commands, session

        # A command's life is bound to the host's process that asked for it: no grace.
        session.serve(listener, launcher=machine_commands.Commands(), default_grace=0)
        os._exit(1)
    listener.close()


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
        with open("/proc/uptime") as uptime:
            self.send({"type": "phase", "name": name, "uptime": float(uptime.read().split()[0])})

    def send(self, message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[os.write(self._fd, data) :]

    def drain(self) -> None:
        """Wait until the keeper has read everything: it answers ``broken`` with ``shutdown``."""
        os.read(self._fd, 4096)

    def serve(self, ports: Ports) -> None:
        """Carry out the keeper's messages until it asks for shutdown."""
        import select

        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        ports.register(poll)
        buffer = b""
        while True:
            for fd, _ in poll.poll():
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
