"""The data directory on real file systems: a loopback btrfs made, kept, mounted again, enlarged; and where none is made."""

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fcvm.errors import HostError
from fcvm.linux import files
from fcvm.setup import progress, storage

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")

SILENT = progress.Silent()
SIZE = 256  # MiB
NOBODY = 65534


@pytest.fixture
def base() -> Iterator[Path]:
    """A place for a data directory on a file system without reflinks."""
    plain = Path(tempfile.mkdtemp(prefix="fcvm-storage-"))  # tmp_path is closed to other users
    plain.chmod(0o755)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", plain], check=True)
    base = plain / "data"
    try:
        yield base
    finally:
        while os.path.ismount(base):
            unmount(base)
        subprocess.run(["umount", plain], check=True)
        plain.rmdir()


def unmount(path: Path) -> None:
    """A btrfs may be busy for a moment with what was just written."""
    for _ in range(100):
        if subprocess.run(["umount", path], check=False).returncode == 0:
            return
        threading.Event().wait(0.1)
    subprocess.run(["umount", path], check=True)


def loops(image: Path) -> int:
    """How many loop devices use ``image``."""
    listed = subprocess.run(["losetup", "-j", image], stdout=subprocess.PIPE, check=True).stdout
    return len(listed.splitlines())


def test_root_gets_a_btrfs_with_reflinks(base: Path) -> None:
    made = storage.ensure(base, SIZE, SILENT)
    assert made.kind == "loopback"
    assert storage.reflinks(base)
    image = storage.image_of(base)
    assert image.stat().st_size == SIZE << 20
    assert image.stat().st_blocks * 512 < SIZE << 19  # sparse
    (base / "a").write_bytes(os.urandom(1 << 20))
    assert files.clone(base / "a", base / "b")
    assert (base / "b").read_bytes() == (base / "a").read_bytes()


def test_a_second_time_changes_nothing(base: Path) -> None:
    storage.ensure(base, SIZE, SILENT)
    (base / "kept").write_text("data")
    assert storage.ensure(base, SIZE, SILENT).kind == "loopback"
    assert (base / "kept").read_text() == "data"
    assert loops(storage.image_of(base)) == 1


def test_it_is_mounted_again_as_after_a_reboot(base: Path) -> None:
    storage.ensure(base, SIZE, SILENT)
    (base / "kept").write_text("data")
    subprocess.run(["umount", base], check=True)
    assert storage.remount(base)
    assert (base / "kept").read_text() == "data"
    assert not storage.remount(base)
    subprocess.run(["umount", base], check=True)
    assert storage.ensure(base, SIZE, SILENT).kind == "loopback"
    assert (base / "kept").read_text() == "data"


def test_it_grows_with_the_setting_and_never_shrinks(base: Path) -> None:
    storage.ensure(base, SIZE, SILENT)
    before = shutil.disk_usage(base).total
    storage.ensure(base, 2 * SIZE, SILENT)
    assert shutil.disk_usage(base).total == 2 * before == (2 * SIZE) << 20
    storage.ensure(base, SIZE, SILENT)
    assert shutil.disk_usage(base).total == 2 * before


def test_two_at_once_make_one(base: Path) -> None:
    kinds = []
    both = [threading.Thread(target=lambda: kinds.append(storage.ensure(base, SIZE, SILENT).kind)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(120)
    assert kinds == ["loopback", "loopback"]
    assert loops(storage.image_of(base)) == 1
    with open("/proc/self/mounts") as mounts:
        assert sum(line.split()[1] == str(base) for line in mounts) == 1


def test_data_that_is_there_is_not_hidden(base: Path) -> None:
    base.mkdir()
    (base / "kept").write_text("data")
    assert storage.ensure(base, SIZE, SILENT).kind == "copies"
    assert (base / "kept").read_text() == "data"
    assert not storage.image_of(base).exists()


def test_a_directory_with_reflinks_is_used_as_it_is(base: Path) -> None:
    storage.ensure(base, SIZE, SILENT)
    inner = base / "inner/data"
    assert storage.ensure(inner, SIZE, SILENT).kind == "reflink"
    assert not storage.image_of(inner).exists()


def test_space_is_given_back_to_the_host(base: Path) -> None:
    storage.ensure(base, SIZE, SILENT)
    image = storage.image_of(base)
    (base / "large").write_bytes(os.urandom(64 << 20))
    subprocess.run(["sync", "-f", base], check=True)
    used = image.stat().st_blocks * 512
    (base / "large").unlink()
    subprocess.run(["sync", "-f", base], check=True)
    subprocess.run(["fstrim", base], check=True)
    assert image.stat().st_blocks * 512 < used - (48 << 20)


def test_a_damaged_image_is_reported_and_kept(base: Path) -> None:
    base.mkdir()
    storage.image_of(base).write_bytes(bytes(1 << 20))
    with pytest.raises(HostError, match="cannot be mounted") as caught:
        storage.ensure(base, SIZE, SILENT)
    assert str(storage.image_of(base)) in (caught.value.hint or "")
    assert storage.image_of(base).stat().st_size == 1 << 20


def test_an_interrupted_one_leaves_no_image(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.process, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        storage.ensure(base, SIZE, SILENT)
    assert not storage.image_of(base).exists()
    monkeypatch.undo()
    assert storage.ensure(base, SIZE, SILENT).kind == "loopback"


def test_a_directory_that_cannot_be_made_is_reported() -> None:
    with pytest.raises(HostError, match="cannot be made"):
        storage.ensure(Path("/proc/nowhere/data"), SIZE, SILENT)


def test_an_ordinary_user_works_by_copies(base: Path) -> None:
    base.mkdir()
    os.chown(base, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        assert storage.ensure(base, SIZE, SILENT).kind == "copies"
        assert not storage.remount(base)
    finally:
        os.seteuid(0)
    assert not storage.image_of(base).exists()
