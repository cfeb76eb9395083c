"""QEMU's command line and monitor; the monitor is a real QEMU's, with no machine in it."""

import contextlib
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fcvm import process
from fcvm.errors import ConflictError, HostError, MachineError
from fcvm.machine import qemu
from fcvm.machine.qmp import Monitor

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
    assert values("-smp") == ["3"]
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
    assert qemu.find() == str(tmp_path / qemu.PROGRAM)


def test_missing_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "PROGRAM", "qemu-system-nothing")
    with pytest.raises(HostError, match="not installed") as caught:
        qemu.find()
    assert "apt-get install" in (caught.value.hint or "")


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    try:
        program = qemu.find()
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


def test_taken_ports_and_foreign_addresses(monitor: Monitor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConflictError, match="Address already in use"):
            monitor.forward("tcp", "127.0.0.1", port, "10.0.2.15", 80)
    for number in (0, 8080):
        with pytest.raises(ConflictError, match=r"203\.0\.113\.1"):
            monitor.forward("tcp", "203.0.113.1", number, "10.0.2.15", 80)
    assert monitor.forwards() == []


def test_a_dead_qemu_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    monitor = Monitor(ours)
    with pytest.raises(MachineError, match="ended"):
        monitor.execute("query-status")
    monitor.close()
