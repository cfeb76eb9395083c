"""The initrd: the archive format, the order of modules, and what an initrd made of small parts holds."""

import gzip
import io
import lzma
import stat
import subprocess
from pathlib import Path

import pytest

from fcvm.errors import SetupError
from fcvm.setup import cpio, index, initrd, modules

ENTRIES = [
    cpio.directory("etc"),
    cpio.file("etc/odd", b"12345", 0o640),
    cpio.file("etc/empty", b""),
    cpio.symlink("link", "etc/odd"),
    cpio.character_device("console", 5, 1, 0o622),
]


def archive(entries: list[cpio.Entry]) -> bytes:
    stream = io.BytesIO()
    cpio.write(stream, entries)
    return stream.getvalue()


def parse(data: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """A reader of newc, written from its description alone: name -> mode, data, device."""
    found = {}
    position = 0
    while True:
        assert data[position : position + 6] == b"070701"
        assert position % 4 == 0
        fields = [int(data[position + 6 + 8 * n : position + 14 + 8 * n], 16) for n in range(13)]
        mode, length, major, minor, name_length = fields[1], fields[6], fields[9], fields[10], fields[11]
        start = position + 110
        name = data[start : start + name_length - 1].decode()
        start = (start + name_length + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, data[start : start + length], (major, minor))
        position = (start + length + 3) // 4 * 4


def test_an_archive_holds_what_was_put_in() -> None:
    assert parse(archive(ENTRIES)) == {
        "etc": (stat.S_IFDIR | 0o755, b"", (0, 0)),
        "etc/odd": (stat.S_IFREG | 0o640, b"12345", (0, 0)),
        "etc/empty": (stat.S_IFREG | 0o644, b"", (0, 0)),
        "link": (stat.S_IFLNK | 0o777, b"etc/odd", (0, 0)),
        "console": (stat.S_IFCHR | 0o622, b"", (5, 1)),
    }


def test_busybox_unpacks_an_archive(tmp_path: Path) -> None:
    packed = archive([entry for entry in ENTRIES if not stat.S_ISCHR(entry.mode)])
    subprocess.run(["busybox", "cpio", "-i"], input=packed, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "etc/odd").read_bytes() == b"12345"
    assert stat.S_IMODE((tmp_path / "etc/odd").stat().st_mode) == 0o640
    assert (tmp_path / "link").readlink() == Path("etc/odd")


def test_the_same_entries_give_the_same_bytes() -> None:
    assert archive(ENTRIES) == archive(list(ENTRIES))


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """A module directory as depmod leaves it, with modules compressed in every way."""
    directory = tmp_path / "6.1"
    contents = {
        "a/base.ko": b"base",
        "a/mid-dle.ko.xz": lzma.compress(b"middle"),
        "b/top.ko.gz": gzip.compress(b"top"),
        "b/virtio-rng.ko.zst": subprocess.run(["zstd", "-cq"], input=b"rng", stdout=subprocess.PIPE, check=True).stdout,
    }
    for name, data in contents.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    (directory / "modules.dep").write_text(
        "a/base.ko:\na/mid-dle.ko.xz: a/base.ko\nb/top.ko.gz: a/mid-dle.ko.xz a/base.ko\nb/virtio-rng.ko.zst:\n"
    )
    (directory / "modules.builtin").write_text("kernel/drivers/virtio/virtio.ko\nkernel/fs/ext4/ext4.ko\n")
    return directory


def test_modules_come_after_what_they_need_and_only_once(kernel: Path) -> None:
    known = modules.read(kernel)
    assert modules.order(known, ["top", "virtio-rng", "mid_dle"]) == ["base", "mid_dle", "top", "virtio_rng"]


def test_built_in_modules_are_left_out(kernel: Path) -> None:
    assert modules.order(modules.read(kernel), ["ext4", "virtio", "base"]) == ["base"]


def test_a_module_that_the_kernel_lacks_is_named(kernel: Path) -> None:
    with pytest.raises(SetupError, match="no module 9p"):
        modules.order(modules.read(kernel), ["9p"])


def test_modules_are_decompressed(kernel: Path) -> None:
    known = modules.read(kernel)
    loaded = {name: modules.load(kernel / path) for name, path in known.paths.items()}
    assert loaded == {"base": b"base", "mid_dle": b"middle", "top": b"top", "virtio_rng": b"rng"}


def build(tmp_path: Path, module_directory: Path | None) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    busybox, agent, image = tmp_path / "busybox", tmp_path / "agent", tmp_path / "initrd.img"
    busybox.write_bytes(b"a shell")
    agent.write_bytes(b"an agent")
    initrd.build(image, busybox=busybox, agent=agent, module_directory=module_directory)
    return parse(image.read_bytes())


def test_an_initrd_has_all_that_init_uses(tmp_path: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "INITRD_MODULES", ("top", "virtio_rng"))
    found = build(tmp_path, kernel)
    assert found["init"][:2] == (stat.S_IFREG | 0o755, index.INITRD_INIT.read_bytes())
    assert found["bin/busybox"][:2] == (stat.S_IFREG | 0o755, b"a shell")
    assert found["fc_agent.pyz"][1] == b"an agent"
    assert found["dev/console"] == (stat.S_IFCHR | 0o600, b"", (5, 1))
    assert found["modules/order"][1] == b"base.ko\nmid_dle.ko\ntop.ko\nvirtio_rng.ko\n"
    assert found["modules/mid_dle.ko"][1] == b"middle"
    for directory in ("dev", "proc", "sys", "lower", "scratch", "root"):
        assert stat.S_ISDIR(found[directory][0])


def test_a_kernel_with_everything_built_in_needs_no_modules(tmp_path: Path) -> None:
    found = build(tmp_path, None)
    assert found["modules/order"][1] == b""
    assert not [name for name in found if name.endswith(".ko")]


def test_init_is_a_script_that_its_shell_accepts() -> None:
    subprocess.run(["busybox", "sh", "-n", str(index.INITRD_INIT)], check=True)
