"""VMs that run VMs: what they need of a host, the words for kernel and Firecracker, the disk's content, images that are lent."""

import os
import sys
from pathlib import Path

import pytest

from fc_agent import nested as guest
from fc_agent import structs
from fcvm import config, host
from fcvm.config import Config
from fcvm.errors import HostError, ImageError, UsageError
from fcvm.firecracker import boot
from fcvm.images import resolve, store
from fcvm.nested import disk, profile
from fcvm.setup import bytecode, kernel
from fcvm.setup.assets import Assets
from fcvm.storage.layout import Layout
from fcvm.volumes.spec import Volume


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    return config.load({"base_dir": tmp_path / "base"}, env={"FCVM_CONFIG": str(tmp_path / "none.toml")})


@pytest.fixture
def assets(tmp_path: Path) -> Assets:
    files = {}
    for name in ("kernels/k1/vmlinux", "initrd/i1/initrd.img", "guest/g1/root.img", "bin/firecracker"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(name.encode())
        files[path.name] = path
    return Assets(
        vmlinux=files["vmlinux"],
        vmlinuz=files["vmlinux"],
        kernel_version="6.12.1",
        root_image=files["root.img"],
        initrd=files["initrd.img"],
        machine_initrd=files["initrd.img"],
        tools=tmp_path,
        firecracker=files["firecracker"],
        firecracker_version="1.12.1",
    )


@pytest.mark.parametrize(("module", "value", "usable"), [
    ("kvm_intel", "Y\n", True), ("kvm_amd", "1\n", True), ("kvm_intel", "N\n", False), ("kvm_amd", "0\n", False),
])  # fmt: skip
def test_nesting_is_the_parameter_of_kvms_module(tmp_path: Path, module: str, value: str, usable: bool) -> None:
    (tmp_path / module / "parameters").mkdir(parents=True)
    (tmp_path / module / "parameters/nested").write_text(value)
    state = host.nesting(tmp_path, "x86_64")
    assert state.usable is usable
    assert module in state.reason
    if not usable:
        assert f"options {module} nested=1" in (state.hint or "")


def test_nesting_without_kvm_and_on_arm(tmp_path: Path) -> None:
    assert "modprobe" in (host.nesting(tmp_path, "x86_64").hint or "")
    assert host.nesting(tmp_path, "aarch64", "quiet kvm-arm.mode=nested").usable
    off = host.nesting(tmp_path, "aarch64", "quiet")
    assert not off.usable
    assert "kvm-arm.mode=nested" in (off.hint or "")


def test_a_host_that_does_not_nest_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "nesting", lambda: host.Kvm(False, "Nested virtualization is off.", "set it"))
    with pytest.raises(HostError, match="off") as error:
        profile.require_nesting()
    assert error.value.hint == "set it"


def test_nv2_is_a_shorthand_on_arm_only(settings: Config) -> None:
    nv2 = structs.replace(settings, nv2=True)
    assert profile.firecracker_args(["--x"], nv2, "aarch64") == ["--x", "--enable-nv2"]
    assert profile.firecracker_args(["--enable-nv2"], nv2, "aarch64") == ["--enable-nv2"]
    assert profile.firecracker_args(["--x"], settings, "x86_64") == ["--x"]
    with pytest.raises(UsageError, match="for arm64"):
        profile.firecracker_args([], nv2, "x86_64")


def test_the_variable_for_nv2(tmp_path: Path) -> None:
    assert config.load(env={"FCVM_CONFIG": str(tmp_path / "none.toml"), "FCVM_NV2": "1"}).nv2


def test_what_an_inception_vm_needs(settings: Config) -> None:
    profile.check(settings, None, "6.12.1-amd64", [], "x86_64")
    kata = structs.replace(settings, kernel_profile="kata")
    with pytest.raises(UsageError, match="has no KVM"):
        profile.check(kata, None, "6.12.1", [], "x86_64")
    profile.check(kata, "/own/vmlinux", "6.12.1", [], "x86_64")
    with pytest.raises(UsageError, match="--enable-nv2"):
        profile.check(settings, None, "6.18.0", [], "aarch64")
    with pytest.raises(UsageError, match=r"6\.18 or later.*6\.12\.1"):
        profile.check(settings, None, "6.12.1-arm64", ["--enable-nv2"], "aarch64")
    profile.check(settings, None, "6.18.0-arm64", ["--enable-nv2"], "aarch64")
    profile.check(settings, "/own/Image", "6.12.1", ["--enable-nv2"], "aarch64")


def test_kernel_command_lines() -> None:
    words = kernel.boot_args(emulated=False, role="vm", nested=True, nv2=True, machine="aarch64").split()
    assert {"kvm-arm.mode=nested", "numa=off", "arm64.nv2"} <= set(words)
    assert not set(kernel.NV2) & set(kernel.boot_args(emulated=False, role="vm", machine="aarch64").split())
    assert not set(kernel.NV2) & set(kernel.boot_args(emulated=False, role="vm", nv2=True, machine="x86_64").split())


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="measures the x86-64 clock")
def test_timers_are_coarse_only_in_an_emulated_vm_that_runs_vms() -> None:
    def coarse(**options: bool) -> bool:
        return set(kernel.COARSE) <= set(kernel.boot_args(role="vm", machine="x86_64", **options).split())

    assert coarse(emulated=True, nested=True)
    assert not coarse(emulated=True, nested=False)
    assert not coarse(emulated=False, nested=True)


def test_images_are_mapped_unless_something_is_there(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    (added,) = profile.with_images([], layout)
    assert added == Volume(str(tmp_path / "images"), "/mnt/fcvm-btrfs/images", read_only=True)
    for place in ("/mnt/fcvm-btrfs", "/mnt", "/mnt/fcvm-btrfs/images"):
        own = [Volume("/x", place)]
        assert profile.with_images(own, layout) == own
    assert len(profile.with_images([Volume("/x", "/mnt/fcvm-btrfs/cache")], layout)) == 2


def test_the_disk_is_laid_out_like_a_data_directory(tmp_path: Path, assets: Assets) -> None:
    tree = tmp_path / "tree"
    disk.furnish(tree, assets, "key")
    there = Assets.from_json((tree / "assets.json").read_text())
    for path, content in ((there.vmlinux, b"kernels/k1/vmlinux"), (there.initrd, b"initrd/i1/initrd.img")):
        assert (tree / path.relative_to(disk.BASE)).read_bytes() == content
    binary = tree / there.firecracker.relative_to(disk.BASE)
    assert binary.read_bytes() == b"bin/firecracker"
    assert os.access(binary, os.X_OK)
    assert os.readlink(tree / there.root_image.relative_to(disk.BASE)) == "/dev/vda"
    assert os.readlink(tree / "nested/key.img") == "/dev/vdd"
    assert {path.name for path in tree.iterdir() if path.is_dir()} == set(guest.SHARED)
    compile((tree / "fcvm").read_text(), "fcvm", "exec")


def test_the_code_has_bytecode_that_python_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "sources/fcvm"
    sources.mkdir(parents=True)
    (sources / "thing.py").write_text("VALUE = 1\n")
    (sources / "data.txt").write_text("text")
    monkeypatch.setattr(disk, "SOURCES", tmp_path / "sources")
    monkeypatch.setattr(disk, "code_files", lambda: [("fcvm/data.txt", 4, 0), ("fcvm/thing.py", 10, 0)])
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "ld.so").write_text(f'#!/bin/sh\nshift 2\nshift\nunset PYTHONHOME\nexec {sys.executable} "$@"\n')
    (tools / "ld.so").chmod(0o755)
    disk.compile_code(tmp_path / "code", tools, tmp_path)
    assert (tmp_path / "code/fcvm/data.txt").read_text() == "text"
    (compiled,) = (tmp_path / "code/fcvm/__pycache__").iterdir()
    assert compiled.name == f"thing.{sys.implementation.cache_tag}.pyc"
    assert compiled.read_bytes()[4:8] == bytecode.UNCHECKED_HASH.to_bytes(4, "little")


def test_the_disks_key_changes_with_what_is_on_it(tmp_path: Path, assets: Assets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SOURCES", tmp_path)
    monkeypatch.setattr(disk, "code_files", lambda: [("code.py", 1, 0)])
    (tmp_path / "code.py").write_text("1")
    before = disk.key(assets)
    assert disk.key(assets) == before
    (tmp_path / "code.py").write_text("2")
    changed = disk.key(assets)
    assets.firecracker.write_bytes(b"another")
    assert len({before, changed, disk.key(assets)}) == 3


def test_adopted_disks_are_copied_once_and_old_ones_removed(tmp_path: Path) -> None:
    ours = Layout(tmp_path / "ours")
    for number in range(4):
        source = tmp_path / f"{number}.img"
        source.write_bytes(str(number).encode())
        copy = disk.adopt(source, ours)
        os.utime(copy, (number, number))
        assert copy.read_bytes() == str(number).encode()
        if number == 0:
            (ours.vms / "vm").mkdir()
            (ours.vms / "vm/fcvm.img").symlink_to(copy)
    assert sorted(path.name for path in (ours.base / "nested").iterdir()) == ["0.img", "2.img", "3.img"]


def test_kvms_module_is_that_of_the_cpu(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    for flag, module in (("vmx", "kvm_intel"), ("svm", "kvm_amd")):
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {flag}\n")
        if os.uname().machine == "x86_64":
            assert guest.kvm_modules(str(cpuinfo)) == [module]
    cpuinfo.write_text("flags\t\t: fpu\n")
    if os.uname().machine == "x86_64":
        with pytest.raises(OSError, match="neither vmx nor svm"):
            guest.kvm_modules(str(cpuinfo))


class Recorder:
    """Stands for Firecracker's API."""

    def __init__(self) -> None:
        self.calls: dict[str, object] = {}

    def put(self, path: str, body: object) -> None:
        self.calls[path] = body


def test_the_disk_is_the_fourth_drive() -> None:
    recorder = Recorder()
    boot.configure(recorder, boot.Hardware(1, 128, "", None, None, nested=True))  # type: ignore[arg-type]
    drives = [path for path in recorder.calls if path.startswith("/drives/")]
    assert drives == ["/drives/root", "/drives/scratch", "/drives/image", "/drives/nested"]


def test_images_of_another_data_directory_are_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve.podman, "find", lambda name: None)
    ours, theirs = Layout(tmp_path / "ours"), Layout(tmp_path / "theirs")
    key = store.key("sha256:" + "1" * 64)
    made = tmp_path / "made.img"
    made.write_bytes(b"disk")
    metadata = store.Metadata("sha256:" + "1" * 64, "sha256:" + "2" * 64, "amd64", 4)
    theirs.images  # noqa: B018
    store.put(theirs, key, made, metadata, name="localhost/lent:latest")
    image = resolve.ensure("localhost/lent", layout=ours, further=theirs)
    assert image.path == theirs.images / f"{key}.img"
    assert resolve.ensure("22222222", layout=ours, further=theirs).path == image.path


def test_another_data_directory_that_has_no_images_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resolve.podman, "find", lambda name: None)
    none = tmp_path / "none"
    for further, said in ((None, 0), (Layout(none), 1)):
        with pytest.raises(ImageError, match="no image"):
            resolve.ensure("localhost/lent", pull="never", layout=Layout(tmp_path / "ours"), further=further)
        assert capsys.readouterr().err.count(f"{none}, which the setting further_images names, has no images") == said
    assert not none.exists()
