"""QEMU's command line and monitor; the monitor is a real QEMU's, with no machine in it."""

import contextlib
import json
import os
import re
import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from fc_agent.structs import replace
from fcvm import process
from fcvm.errors import ConflictError, HostError, MachineError, NetworkError
from fcvm.machine import qemu
from fcvm.machine.ports import Ports
from fcvm.machine.qmp import Monitor
from fcvm.network.ports import reserve
from fcvm.network.publish import Publish
from fcvm.setup import index, kernel

SPEC = qemu.Spec(
    cpus=3,
    memory=2048,
    kernel=Path("/k/vmlinuz"),
    initrd=Path("/i/initrd.img"),
    root=Path("/r/root.img"),
    disk=Path("/with,comma/disk.img"),
    oem=Path("/run/oem"),
    console=Path("/c/console.log"),
    control_fd=7,
    qmp_fd=8,
    hostfs_fd=9,
    vsock_fd=6,
    kernel_arguments="quiet fcvm.role=machine",
)


def values(option: str) -> list[str]:
    words = qemu.command(SPEC, "/usr/bin/qemu")
    return [words[number + 1] for number, word in enumerate(words) if word == option]


def test_command_line() -> None:
    assert values("-smp") == ["4"]  # the first is for no program
    assert values("-m") == ["2048M"]
    assert values("-append") == ["quiet fcvm.role=machine"]
    assert "svm=on" in values("-cpu")[0]
    assert values("-smbios") == ["type=11,path=/run/oem"]
    root, disk = values("-drive")
    assert "file=/r/root.img," in root
    assert "readonly=on" in root
    assert "file=/with,,comma/disk.img," in disk
    assert "unsafe" not in disk
    assert {re.search(r"fd=(\d)", value)[1] for value in values("-chardev") if "fd=" in value} == {"6", "7", "8", "9"}  # type: ignore[index]
    assert any("size=2048M" in value and "share=on" in value for value in values("-object"))


@pytest.mark.parametrize(("memory", "translated"), [(1024, 256), (4096, 512), (8192, 1024), (65536, 1024)])
def test_translated_code_has_a_part_of_the_machines_memory(memory: int, translated: int) -> None:
    (accelerator,) = [words[1] for words in pairwise(qemu.command(replace(SPEC, memory=memory), "qemu")) if words[0] == "-accel"]
    assert accelerator.endswith(f",tb-size={translated}")


def test_nothing_of_the_host_is_taken_by_default() -> None:
    words = qemu.command(SPEC, "/usr/bin/qemu")
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(words)


def fake_qemu(directory: Path, version: str) -> None:
    program = directory / qemu.PROGRAM
    program.write_text(f"#!/bin/sh\necho 'QEMU emulator version {version} (Debian)'\n")
    program.chmod(0o755)


def test_old_qemu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_qemu(tmp_path, "7.2.9")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(HostError, match="too old") as caught:
        qemu.find()
    assert "apt-get install" in (caught.value.hint or "")
    fake_qemu(tmp_path, "11.0.0")
    assert qemu.find() == (str(tmp_path / qemu.PROGRAM), "11.0.0")


def test_missing_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "PROGRAM", "qemu-system-nothing")
    with pytest.raises(HostError, match="not installed") as caught:
        qemu.find()
    assert "apt-get install" in (caught.value.hint or "")


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    try:
        program, _ = qemu.find()
    except HostError:
        pytest.skip("QEMU is not installed")
    ours, theirs = socket.socketpair()
    words = ["-M", "none", "-nodefaults", "-display", "none", "-netdev", "user,id=net"]
    words += ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"]
    child = process.spawn([program, *words], pass_fds=[theirs.fileno()])
    theirs.close()
    monitor = Monitor(ours)
    try:
        yield monitor
    finally:
        with contextlib.suppress(MachineError):
            monitor.execute("quit")
        child.wait()
        monitor.close()


def test_monitor_answers(monitor: Monitor) -> None:
    assert monitor.execute("query-status")["running"] is True
    with pytest.raises(MachineError, match="no-such-command"):
        monitor.execute("no-such-command")
    assert monitor.execute("query-status")["status"] == "running"


def test_ports_are_forwarded_and_taken_back(monitor: Monitor) -> None:
    port = monitor.forward("tcp", "127.0.0.1", 0, "10.0.2.15", 80)
    assert monitor.forwards() == [("tcp", "127.0.0.1", port, 80)]
    with socket.create_connection(("127.0.0.1", port), timeout=60):
        pass
    monitor.cancel("tcp", "127.0.0.1", port)
    assert monitor.forwards() == []
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))


def test_udp_ports(monitor: Monitor) -> None:
    port = monitor.forward("udp", "127.0.0.1", 0, "10.0.2.15", 53)
    assert monitor.forwards() == [("udp", "127.0.0.1", port, 53)]


def test_a_port_on_all_addresses(monitor: Monitor) -> None:
    port = monitor.forward("tcp", "", 0, "10.0.2.15", 80)
    with socket.create_connection(("127.0.0.2", port), timeout=60):
        pass
    monitor.cancel("tcp", "", port)
    assert monitor.forwards() == []


@pytest.fixture
def ports(monitor: Monitor) -> Iterator[Ports]:
    made = Ports(monitor)
    yield made
    made.close()


def connects(ip: str, port: int) -> bool:
    try:
        socket.create_connection((ip, port), timeout=60).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.parametrize(
    ("host_ip", "reached", "closed"),
    [
        ("", ["127.0.0.1", "127.0.0.2", "::1"], []),
        ("127.0.0.1", ["127.0.0.1"], ["127.0.0.2", "::1"]),
        ("::1", ["::1"], ["127.0.0.1"]),
    ],
)
def test_ports_are_published_in_both_families(
    ports: Ports, monitor: Monitor, host_ip: str, reached: list[str], closed: list[str]
) -> None:
    port = ports.publish(1, Publish(host_ip, 0, 80))
    assert [ip for ip in reached if not connects(ip, port)] == []
    assert [ip for ip in closed if connects(ip, port)] == []
    ports.withdraw(1)
    ports.withdraw(1)  # nothing is left to do
    assert monitor.forwards() == []
    reserve([Publish(host_ip, port, 80)])[0].close()


def test_udp_is_published_in_both_families(ports: Ports, monitor: Monitor) -> None:
    port = ports.publish(1, Publish("", 0, 53, "udp"))
    assert [(protocol, host_port) for protocol, _, host_port, _ in monitor.forwards()] == [("udp", port)]
    with pytest.raises(ConflictError, match="in use"):
        reserve([Publish("::1", port, 53, "udp")])


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_taken_port_is_told_with_its_owner(ports: Ports, monitor: Monitor, family: int) -> None:
    with socket.create_server(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConflictError, match=rf"Port {port}/tcp is in use by .*pid {os.getpid()}"):
            ports.publish(1, Publish("", port, 80))
    assert monitor.forwards() == []


def test_a_foreign_address(ports: Ports) -> None:
    with pytest.raises(NetworkError, match=r"203\.0\.113\.1"):
        ports.publish(1, Publish("203.0.113.1", 0, 80))


def test_a_dead_qemu_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    monitor = Monitor(ours)
    with pytest.raises(MachineError, match="ended"):
        monitor.execute("query-status")
    monitor.close()


def test_an_answer_that_comes_late_is_not_taken_for_the_next_ones() -> None:
    ours, theirs = socket.socketpair()
    with theirs, theirs.makefile("r") as lines:

        def say(**message: object) -> None:
            theirs.sendall(json.dumps(message).encode() + b"\n")

        def answer(value: object) -> None:
            asked = json.loads(lines.readline())
            say(**{"return": value}, **({"id": asked["id"]} if "id" in asked else {}))

        monitor = Monitor(ours, timeout=0.2)
        say(QMP={})
        say(**{"return": {}}, id=1)
        with pytest.raises(MachineError, match="does not answer"):
            monitor.execute("query-status")
        answer({})  # qmp_capabilities
        answer("late")
        say(**{"return": "now"}, id=3)
        assert monitor.execute("query-name") == "now"
        monitor.close()


def test_the_machine_starts_its_cpus_by_itself_and_vms_do_not() -> None:
    machine, vm = (kernel.boot_args(emulated=True, role=role, machine="x86_64").split() for role in ("machine", "vm"))
    assert "maxcpus=1" in machine
    assert "maxcpus=1" not in vm
    assert "/sys/devices/system/cpu/cpu*/online" in index.INITRD_INIT.read_text()
    told = {name: int(value) for name, _, value in (word.partition("=") for word in machine) if name in ("lpj", "tsc_early_khz")}
    assert told["lpj"] == told["tsc_early_khz"] * 1000 // 250
