"""Keys and pointers: what changes them, and that nothing stale or half there is ever found."""

import shutil
from pathlib import Path

import pytest

from fc_agent import structs
from fcvm import config, setup
from fcvm.config import Config
from fcvm.errors import HostError, SetupError, UsageError
from fcvm.setup import assets, index, keys, recipe
from fcvm.setup.index import Firecracker, Image, Kata
from fcvm.storage.layout import Layout

IMAGE = Image(id="1" * 16, kernel="2" * 16, kernel_version="6.12.1-cloud", busybox="3" * 16, suite="trixie")


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    return config.load({"base_dir": tmp_path / "base"}, env={"FCVM_CONFIG": str(tmp_path / "none.toml")})


@pytest.fixture(autouse=True)
def no_system_assets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(assets, "SYSTEM_BASE", tmp_path / "system")
    monkeypatch.delenv(assets.OVERRIDE, raising=False)


def populate(base: Path, settings: Config) -> None:
    """A data directory in which everything is set up, with small files."""
    for name in (f"guest/{IMAGE.id}/root.img", f"kernels/{IMAGE.kernel}/vmlinux", f"kernels/{IMAGE.kernel}/vmlinuz"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    index.image_pointer(settings, base).write_text(index.to_json(IMAGE))
    initrd = index.initrd(base, IMAGE.kernel, IMAGE.busybox)
    initrd.parent.mkdir(parents=True)
    initrd.write_text("initrd")
    binary = base / "bin/abc/firecracker"
    binary.parent.mkdir(parents=True)
    binary.write_text("firecracker")
    status = binary.stat()
    chosen = Firecracker("bin/abc/firecracker", "1.12.1", status.st_size, status.st_mtime_ns, True)
    (base / "bin/firecracker.json").write_text(index.to_json(chosen))


def test_keys_do_not_depend_on_the_order_of_members() -> None:
    assert keys.of({"a": 1, "b": [2]}) == keys.of({"b": [2], "a": 1})
    assert keys.of({"a": 1, "b": [2]}) != keys.of({"a": 1, "b": [3]})


def test_the_key_of_sources_follows_names_and_contents(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1")
    seen = {keys.of_sources([package])}
    (package / "notes.txt").write_text("not source")
    assert keys.of_sources([package]) in seen
    (package / "a.py").write_text("2")
    seen.add(keys.of_sources([package]))
    (package / "a.py").rename(package / "b.py")
    seen.add(keys.of_sources([package]))
    (package / "c.py").write_text("")
    seen.add(keys.of_sources([package]))
    assert len(seen) == 4


def test_the_key_of_the_image_follows_its_inputs(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path(settings.base_dir)
    before = index.image_pointer(settings, base)
    assert index.image_pointer(settings, base) == before
    other_suite = structs.replace(settings, debian_suite="sid")
    assert index.image_pointer(other_suite, base) != before
    monkeypatch.setattr(recipe, "PACKAGES", (*recipe.PACKAGES, "vim"))
    assert index.image_pointer(settings, base) != before


def test_the_key_of_the_initrd_follows_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "src"
    for name in ("fc_agent", "fuse_pipe"):
        shutil.copytree(index.SOURCES / name, sources / name)
    (sources / "fcvm/agent").mkdir(parents=True)
    shutil.copy(index.SOURCES / "fcvm/agent/pack.py", sources / "fcvm/agent")
    before = index.initrd(tmp_path, "kernel", "busybox")
    monkeypatch.setattr(index, "SOURCES", sources)
    assert index.initrd(tmp_path, "kernel", "busybox") == before
    assert index.initrd(tmp_path, "another", "busybox") != before
    assert index.initrd(tmp_path, "kernel", "another") != before
    (sources / "fc_agent/__init__.py").write_text("changed")
    assert index.initrd(tmp_path, "kernel", "busybox") != before


def test_everything_is_found_where_it_was_put(settings: Config) -> None:
    base = Path(settings.base_dir)
    populate(base, settings)
    found = setup.find(settings, Layout(base))
    assert found.root_image.read_text() == f"guest/{IMAGE.id}/root.img"
    assert found.vmlinux == base / "kernels" / IMAGE.kernel / "vmlinux"
    assert found.initrd == found.machine_initrd == index.initrd(base, IMAGE.kernel, IMAGE.busybox)
    assert found.firecracker == base / "bin/abc/firecracker"
    assert (found.kernel_version, found.firecracker_version) == ("6.12.1-cloud", "1.12.1")
    assert found.tool("virtiofsd")[0] == str(base / "guest" / IMAGE.id / "tools/ld.so")


def test_a_moved_data_directory_still_holds_everything(settings: Config, tmp_path: Path) -> None:
    populate(Path(settings.base_dir), settings)
    Path(settings.base_dir).rename(tmp_path / "moved")
    assert setup.find(settings, Layout(tmp_path / "moved")).firecracker.is_relative_to(tmp_path / "moved")


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        (f"guest/{IMAGE.id}/root.img", "guest image"),
        (f"kernels/{IMAGE.kernel}/vmlinux", "guest image"),
        ("initrd", "initrd"),
        ("bin/abc", "Firecracker"),
        ("bin/firecracker.json", "Firecracker"),
    ],
)
def test_what_is_missing_is_named(settings: Config, lost: str, named: str) -> None:
    base = Path(settings.base_dir)
    populate(base, settings)
    path = base / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(SetupError, match=named) as caught:
        setup.find(settings, Layout(base))
    assert caught.value.hint == "fcvm setup"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"id": "1"}', '{"unknown": 1}', "\x00"])
def test_a_damaged_pointer_means_not_there(settings: Config, content: str) -> None:
    base = Path(settings.base_dir)
    populate(base, settings)
    index.image_pointer(settings, base).write_text(content)
    (base / "bin/firecracker.json").write_text(content)
    assert index.image(settings, base) is None
    assert index.firecracker(settings, base) is None


def test_a_changed_binary_is_not_the_one_that_was_chosen(settings: Config) -> None:
    base = Path(settings.base_dir)
    populate(base, settings)
    (base / "bin/abc/firecracker").write_text("another build")
    assert index.firecracker(settings, base) is None


def test_another_binary_in_the_settings_means_choose_again(settings: Config, tmp_path: Path) -> None:
    base = Path(settings.base_dir)
    populate(base, settings)
    assert index.firecracker(structs.replace(settings, firecracker="/usr/bin/true"), base) is None
    link = tmp_path / "link"
    link.symlink_to(base / "bin/abc/firecracker")
    assert index.firecracker(structs.replace(settings, firecracker=str(link)), base) is not None


def test_the_systems_assets_are_shared_part_by_part(settings: Config, tmp_path: Path) -> None:
    populate(tmp_path / "system", settings)
    own = Layout(settings.base_dir)
    assert setup.find(settings, own).root_image.is_relative_to(tmp_path / "system")
    shutil.rmtree(tmp_path / "system/initrd")  # as when the user runs another version than root
    initrd = index.initrd(own.base, IMAGE.kernel, IMAGE.busybox)
    initrd.parent.mkdir(parents=True)
    initrd.write_text("")
    found = setup.find(settings, own)
    assert found.initrd == initrd
    assert found.root_image.is_relative_to(tmp_path / "system")


def test_assets_survive_json(settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    populate(Path(settings.base_dir), settings)
    found = setup.find(settings, Layout(settings.base_dir))
    told = tmp_path / "assets.json"
    told.write_text(found.to_json())
    monkeypatch.setenv(assets.OVERRIDE, str(told))
    assert setup.find(settings, Layout(tmp_path / "elsewhere")) == found
    told.write_text("{}")
    with pytest.raises(SetupError, match=r"assets\.json"):
        setup.find(settings, Layout(settings.base_dir))


def test_the_kata_profile_has_its_own_kernel_and_initrd(settings: Config) -> None:
    base = Path(settings.base_dir)
    populate(base, settings)
    kata = structs.replace(settings, kernel_profile="kata", kernel_url="http://h/k.tar.zst", kernel_sha256="a" * 64)
    with pytest.raises(SetupError, match="kata kernel"):
        setup.find(kata, Layout(base))
    kernel = Kata("4" * 16, "6.18.5-177")
    (base / "kernels" / kernel.id).mkdir()
    (base / "kernels" / kernel.id / "vmlinux").write_text("kata")
    index.kata_pointer(kata, base).write_text(index.to_json(kernel))
    with pytest.raises(SetupError, match="initrd"):
        setup.find(kata, Layout(base))
    initrd = index.initrd(base, kernel.id, IMAGE.busybox)
    initrd.parent.mkdir()
    initrd.write_text("")
    found = setup.find(kata, Layout(base))
    assert (found.vmlinux.read_text(), found.initrd) == ("kata", initrd)
    assert found.machine_initrd != initrd
    assert setup.find(settings, Layout(base)).vmlinux != found.vmlinux


def test_wrong_settings_are_refused(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="SHA-256"):
        index.kata_archive(structs.replace(settings, kernel_url="http://h/k.tar.xz"))
    url, sha256 = index.kata_archive(structs.replace(settings, kernel_sha256="B" * 64))
    assert url.endswith(".tar.zst")
    assert sha256 == "b" * 64
    monkeypatch.setattr(index.os, "uname", lambda: type("Host", (), {"machine": "riscv64"}))
    with pytest.raises(HostError, match="riscv64"):
        index.architecture()
