"""What the host can do: KVM in all its states, the CPU's clock, and the checks of `fcvm doctor`."""

import argparse
import errno
import json
import os
import re
from pathlib import Path

import pytest

from fc_agent import structs
from fcvm import config, host, tsc
from fcvm.cli import doctor
from fcvm.cli.context import Context
from fcvm.config import Config
from fcvm.errors import HostError
from fcvm.linux import namespaces
from fcvm.setup import assets, checks, index
from fcvm.setup.checks import Check
from fcvm.storage.layout import Layout

NO_FLAGS: frozenset[str] = frozenset()
SVM = frozenset({"fpu", "svm"})


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    return config.load({"base_dir": tmp_path / "base"}, env={"FCVM_CONFIG": str(tmp_path / "none.toml")})


@pytest.mark.parametrize(
    ("flags", "device", "modules", "machine", "reason", "hint"),
    [
        (NO_FLAGS, "/dev/missing", NO_FLAGS, "x86_64", "neither vmx nor svm", "nested virtualization"),
        (NO_FLAGS, "/dev/null", NO_FLAGS, "x86_64", "software KVM", "nested virtualization"),
        (SVM, "/dev/null", frozenset({"kvm_pvm"}), "x86_64", "software KVM", "rmmod kvm_pvm"),
        (SVM, "/dev/missing", NO_FLAGS, "x86_64", "not loaded", "modprobe kvm_amd"),
        (frozenset({"vmx"}), "/dev/missing", NO_FLAGS, "x86_64", "not loaded", "modprobe kvm_intel"),
        (NO_FLAGS, "/dev/missing", NO_FLAGS, "aarch64", "not loaded", "modprobe kvm"),
        (SVM, "/dev/null", NO_FLAGS, "x86_64", "not a KVM device", "dmesg"),
    ],
)
def test_why_kvm_is_not_usable(
    flags: frozenset[str], device: str, modules: frozenset[str], machine: str, reason: str, hint: str
) -> None:
    state = host.examine_kvm(flags, Path(device), modules, machine)
    assert not state.usable
    assert reason in state.reason
    assert hint in (state.hint or "")


def test_a_device_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(host.os, "open", refuse)  # root may open anything
    state = host.examine_kvm(SVM, tmp_path / "kvm", NO_FLAGS, "x86_64")
    assert "may not open" in state.reason
    assert "usermod -aG kvm" in (state.hint or "")


@pytest.mark.skipif(not os.access("/dev/kvm", os.W_OK), reason="no /dev/kvm")
def test_a_kvm_device_that_makes_vms_is_usable_where_the_cpu_has_the_extension() -> None:
    assert host.examine_kvm(SVM, Path("/dev/kvm"), NO_FLAGS, "x86_64").usable


@pytest.mark.parametrize(("setting", "usable", "expected"), [
    ("auto", True, False), ("auto", False, True), ("always", True, True), ("always", False, True), ("never", False, False),
])  # fmt: skip
def test_when_the_machine_is_used(
    settings: Config, monkeypatch: pytest.MonkeyPatch, setting: str, usable: bool, expected: bool
) -> None:
    monkeypatch.setattr(host, "kvm", lambda: host.Kvm(usable, "because"))
    assert host.uses_machine(structs.replace(settings, machine=setting)) is expected


def test_a_kvm_without_permission_is_no_reason_to_emulate(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "kvm", lambda: host.Kvm(False, "You may not.", "sudo this", forbidden=True))
    assert not host.uses_machine(structs.replace(settings, machine="auto"))
    assert host.uses_machine(structs.replace(settings, machine="always"))
    with pytest.raises(HostError, match="You may not") as raised:
        host.need_kvm()
    assert raised.value.hint == "sudo this"


def test_cpu_flags_of_both_architectures(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nflags\t\t: fpu svm npt\nbugs\t\t: x\n\nprocessor\t: 1\nflags\t\t: other\n")
    assert host.cpu_flags(file) == {"fpu", "svm", "npt"}
    file.write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert host.cpu_flags(file) == {"fp", "asimd"}
    assert host.cpu_flags(tmp_path / "missing") == frozenset()


x86_only = pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 machine code")


@x86_only
def test_the_measured_clock_agrees_with_itself_and_with_what_is_told() -> None:
    first, second = tsc.measure_tsc_khz(), tsc.measure_tsc_khz()
    assert 100_000 < first < 10_000_000
    assert abs(first - second) < first / 1000
    if "constant_tsc" in host.cpu_flags() and "tsc_early_khz" not in Path("/proc/cmdline").read_text():
        assert abs(tsc.tsc_khz() - first) < first / 1000


@x86_only
def test_the_hypervisors_signature_is_text() -> None:
    assert re.fullmatch(r"[ -~]{0,12}", tsc.hypervisor())
    assert bool(tsc.hypervisor()) == ("hypervisor" in host.cpu_flags())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("anna:100000:65536\n", True),
        ("1000:100000:65536\n", True),
        ("otto:100000:65536\n", False),
        ("anna:100000:1000\n", False),
        ("anna:100000\nanna:x:y\n", False),
        ("", False),
    ],
)
def test_subordinate_ids_are_read(tmp_path: Path, text: str, expected: bool) -> None:
    (tmp_path / "subuid").write_text(text)
    assert checks.has_range(tmp_path / "subuid", "anna", "1000") is expected


def test_a_user_without_a_name_is_called_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000_000)
    assert host.user_name() == "4000000000"
    assert checks.subordinate_ids().name == "Subordinate ids"


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's identity")
def test_a_data_directory_that_may_not_be_looked_into_is_a_finding(tmp_path: Path, settings: Config) -> None:
    """pathlib's exists and is_dir raise there."""
    tmp_path.chmod(0o700)
    os.seteuid(65534)
    try:
        assert checks.reflinks(settings, Layout(settings.base_dir)).status == "fail"
        assert checks.space(Layout(settings.base_dir)).detail
        assert assets.initrd_of(Layout(settings.base_dir), "kernel", index.Image("a", "b", "c", "d", "e")) is None
    finally:
        os.seteuid(0)


def test_a_file_of_subordinate_ids_that_is_missing(tmp_path: Path) -> None:
    assert not checks.has_range(tmp_path / "subuid", "anna", "1000")


def fake_programs(directory: Path, monkeypatch: pytest.MonkeyPatch, **outputs: str) -> None:
    """Put programs on an otherwise empty PATH, each printing a text."""
    directory.mkdir(exist_ok=True)
    for name, text in outputs.items():
        program = directory / name.replace("_", "-")
        program.write_text(f"#!/bin/sh\necho '{text}'\n")
        program.chmod(0o755)
    monkeypatch.setattr(checks.process, "environment", lambda extra=None: {"PATH": str(directory)})


@pytest.mark.parametrize(
    ("version", "status"),
    [("QEMU emulator version 10.0.2 (Debian 1:10)", "ok"), ("QEMU emulator version 7.2.9", "fail"), ("what?", "fail"), ("", "fail")],
)
def test_the_version_of_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, status: str) -> None:
    program = tmp_path / "qemu-system-x86_64"
    program.write_text(f"#!/bin/sh\necho '{version}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert checks.qemu().status == status


def test_missing_programs_are_named_with_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_programs(tmp_path / "bin", monkeypatch, zstd="", skopeo="")
    found = list(checks.programs(ready=False))
    assert {check.status for check in found} == {"fail"}
    assert {check.hint for check in found} == {
        "sudo apt-get install mmdebstrap",
        "sudo apt-get install e2fsprogs",
    }


def test_where_all_is_set_up_what_only_setup_takes_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_programs(tmp_path / "bin", monkeypatch)
    found = {check.detail.split()[0]: check.status for check in checks.programs(ready=True)}
    assert found == {"mmdebstrap": "warn", "zstd": "warn", "skopeo": "warn", "mkfs.ext4": "fail"}


def test_what_stands_in_the_way_of_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: int) -> None:
        raise OSError(errno.ENOSPC, "no room")

    fake_programs(tmp_path / "bin", monkeypatch)
    monkeypatch.setattr(namespaces, "unshare", refuse)
    found = list(checks.networks("rootless"))
    assert [check.status for check in found] == ["fail", "fail"]
    assert found[0].hint == "apt-get install slirp4netns"
    assert "user namespace" in found[1].detail
    assert checks.user_namespaces().status == "warn"


def doctor_run(context: Context, capsys: pytest.CaptureFixture[str], *, as_json: bool) -> tuple[int, str]:
    code = doctor.run(argparse.Namespace(json=as_json), context)
    return code, capsys.readouterr().out


@pytest.mark.parametrize(("statuses", "code"), [(["ok", "ok"], 0), (["ok", "warn"], 0), (["warn", "fail"], 1)])
def test_the_exit_code_tells_whether_run_can_work(
    settings: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    statuses: list[checks.Status],
    code: int,
) -> None:
    found = [Check(f"check {number}", status, "detail", "mend it") for number, status in enumerate(statuses)]
    monkeypatch.setattr(checks, "every", lambda *_: iter(found))
    result, text = doctor_run(Context(settings), capsys, as_json=False)
    assert result == code
    assert text.count("mend it") == sum(status != "ok" for status in statuses)
    result, text = doctor_run(Context(settings), capsys, as_json=True)
    parsed = json.loads(text)
    assert (result, parsed["ok"], parsed["schema"]) == (code, code == 0, 1)
    assert parsed["checks"][0] == {"name": "check 0", "status": statuses[0], "detail": "detail", "hint": "mend it"}


def test_a_host_where_nothing_was_set_up(settings: Config, capsys: pytest.CaptureFixture[str]) -> None:
    settings = structs.replace(settings, kernel_profile="debian", debian_suite="never-built")
    code, text = doctor_run(Context(settings), capsys, as_json=True)
    by_name = {check["name"]: check for check in json.loads(text)["checks"]}
    assert code == 1
    assert by_name["Setup"]["status"] == "fail"
    assert by_name["Setup"]["hint"] == "fcvm setup"
    assert by_name["Storage"]["hint"] == "fcvm setup --storage-only"
    assert not Path(settings.base_dir).exists()


@pytest.mark.parametrize(
    ("instances", "watches", "status", "hint"),
    [
        (128, 65536, "ok", None),
        (16, 65536, "warn", "sudo sysctl -w fs.inotify.max_user_instances=128"),
        (128, 100, "warn", "sudo sysctl -w fs.inotify.max_user_watches=8192"),
    ],
)
def test_few_watches_are_told_of(tmp_path: Path, instances: int, watches: int, status: str, hint: str | None) -> None:
    (tmp_path / "max_user_instances").write_text(f"{instances}\n")
    (tmp_path / "max_user_watches").write_text(f"{watches}\n")
    found = checks.watches(tmp_path)
    assert (found.status, found.hint) == (status, hint)
