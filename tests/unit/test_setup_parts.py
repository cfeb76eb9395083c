"""Progress, downloads, archives and binaries: the small parts of setup, without root and without network."""

import hashlib
import io
import os
import pty
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fc_agent import structs
from fcvm import config
from fcvm.config import Config
from fcvm.errors import HostError, SetupError
from fcvm.setup import download, firecracker, guest, index, kata, progress, recipe, workspace
from fcvm.storage.layout import Layout

STEP = progress._SilentStep()


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    return config.load({"base_dir": tmp_path / "base"}, env={"FCVM_CONFIG": str(tmp_path / "none.toml")})


# --- progress


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_999, "1.0 MB"),
        (338_000_000, "338 MB"),
        (2_500_000_000, "2.5 GB"),
    ],
)
def test_sizes_are_for_people(count: int, text: str) -> None:
    assert progress.size(count) == text


def test_plain_progress_is_two_lines_a_step() -> None:
    stream = io.StringIO()
    with progress.open(stream) as shown, shown.step("Kernel") as step:
        for done in range(0, 5_000_001, 1000):
            step.update(done, 5_000_000)
        step.note("unpacking")
    begun, done = stream.getvalue().splitlines()
    assert begun == "Kernel ..."
    assert done.startswith("Kernel: done, 5.0 MB, ")
    assert done.endswith(" s")


def test_a_failed_step_says_so() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="broken"), progress.open(stream) as shown, shown.step("Kernel"):
        raise ValueError("broken")
    assert "Kernel: failed after" in stream.getvalue()


def test_nothing_to_do_shows_nothing() -> None:
    stream = io.StringIO()
    with progress.open(stream):
        pass
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_live_display_that_ends_with_a_line_per_step() -> None:
    pytest.importorskip("rich")
    script = (
        "from fcvm.setup import progress\n"
        "with progress.open() as shown, shown.step('Kernel') as step:\n"
        "    step.update(1_000_000, 2_000_000); step.update(2_000_000, 2_000_000)\n"
    )
    master, slave = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", script], stderr=slave, env=environment) as child:
        os.close(slave)
        output = b""
        try:
            while block := os.read(master, 4096):
                output += block
        except OSError:  # EIO: the other side is closed
            pass
        os.close(master)
        assert child.wait() == 0
    assert b"Kernel" in output
    assert b"2.0 MB" in output
    assert b"\x1b[" in output


# --- work directories


def test_a_work_directory_is_cleared_before_and_after(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    left_over = layout.cache / "build-thing"
    (left_over / "deep").mkdir(parents=True)
    with workspace.building(layout, "thing", STEP) as work:
        assert work == left_over
        assert not list(work.iterdir())
        (work / "half").write_text("made")
    assert not left_over.exists()


def test_a_work_directory_is_cleared_after_an_interruption(tmp_path: Path) -> None:
    layout = Layout(tmp_path)

    def interrupted() -> None:
        with workspace.building(layout, "thing", STEP) as work:
            (work / "half").write_text("made")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(layout.cache.iterdir()) == [layout.cache / "build-thing.lock"]


def test_two_builders_wait_for_each_other(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    waits = threading.Event()
    order = []

    class Step:
        def update(self, done: int, total: int | None = None) -> None:
            pass

        def note(self, text: str) -> None:
            assert text == "waiting for another fcvm"
            waits.set()

    def second() -> None:
        with workspace.building(layout, "thing", Step()):
            order.append("second")

    other = threading.Thread(target=second)
    with workspace.building(layout, "thing", STEP):
        other.start()
        assert waits.wait(60)
        order.append("first")
    other.join(60)
    assert order == ["first", "second"]


def test_a_directory_that_is_there_already_stays(tmp_path: Path) -> None:
    for name, text in (("old", "old"), ("new", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    workspace.publish(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old/file").read_text() == "old"
    assert not (tmp_path / "new").exists()


def test_what_is_published_is_on_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/small").write_text("content")
    synced = []
    monkeypatch.setattr(workspace, "syncfs", lambda fd: synced.append((os.readlink(f"/proc/self/fd/{fd}"), os.listdir(fd), (tmp_path / "old").exists())))
    workspace.publish(tmp_path / "new", tmp_path / "old")
    assert synced == [(str(tmp_path / "new"), ["small"], False)]


def test_too_little_space_is_told_before_anything_is_done(tmp_path: Path) -> None:
    workspace.require_space(tmp_path, 1)
    with pytest.raises(HostError, match="Too little space"):
        workspace.require_space(tmp_path, 1 << 60)


# --- downloads


def test_a_file_is_fetched_and_verified(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"content")
    url, sha256 = f"file://{tmp_path}/source", hashlib.sha256(b"content").hexdigest()
    download.fetch(url, tmp_path / "copy", step=STEP, sha256=sha256.upper(), by_hand="")
    assert (tmp_path / "copy").read_bytes() == b"content"
    with pytest.raises(SetupError, match="not the file expected") as caught:
        download.fetch(url, tmp_path / "copy", step=STEP, sha256="0" * 64, by_hand="do this")
    assert sha256 in caught.value.message
    assert caught.value.hint == "do this"


@pytest.mark.parametrize("url", ["file:///does/not/exist", "http://127.0.0.1:1/file", "nonsense://x/y", "not a url"])
def test_what_cannot_be_fetched_is_named(tmp_path: Path, url: str) -> None:
    with pytest.raises(SetupError) as caught:
        download.fetch(url, tmp_path / "copy", step=STEP, sha256=None, by_hand="do this")
    assert caught.value.message.startswith(f"{url} cannot be fetched: ")
    assert caught.value.hint == "do this"


# --- the kata kernel


def tar(path: Path, members: dict[str, bytes | str], mode: str) -> None:
    """An archive of files (bytes) and symbolic links (text)."""
    with tarfile.open(path, f"w:{mode}") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


SHARE = f"./{kata.KATA_DIRECTORY}"
RELEASE: dict[str, bytes | str] = {
    "./opt/kata/bin/firecracker": b"not this",
    f"{SHARE}/config-6.9.1": b"",
    f"{SHARE}/vmlinux-6.9.1-200": b"older",
    f"{SHARE}/vmlinux-6.18.5-177": b"the kernel",
    f"{SHARE}/vmlinux-6.18.5-177-nvidia-gpu": b"not this",
    f"{SHARE}/vmlinuz-6.18.5-177": b"not this",
    f"{SHARE}/vmlinux.container": "vmlinux-6.18.5-177",
}


@pytest.mark.parametrize("suffix", [".tar.zst", ".tar.xz", ".tar.gz", ".tgz", ".tar"])
def test_the_kernel_of_a_release(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"kata-static{suffix}"
    mode = {".tar.xz": "xz", ".tar.gz": "gz", ".tgz": "gz"}.get(suffix, "")
    plain = path.with_suffix("") if suffix == ".tar.zst" else path
    tar(plain, RELEASE, mode)
    if suffix == ".tar.zst":
        subprocess.run(["zstd", "-q", plain, "-o", path], check=True)
    assert kata.unpack(path, tmp_path / "vmlinux") == "6.18.5-177"
    assert (tmp_path / "vmlinux").read_bytes() == b"the kernel"


def test_without_a_link_the_newest_kernel_is_taken(tmp_path: Path) -> None:
    members = {name: content for name, content in RELEASE.items() if not isinstance(content, str)}
    tar(tmp_path / "k.tar", members, "")
    assert kata.unpack(tmp_path / "k.tar", tmp_path / "vmlinux") == "6.18.5-177"


@pytest.mark.parametrize("members", [{}, {"./opt/kata/bin/x": b""}, {f"{SHARE}/vmlinux.container": "vmlinux-1.2"}])
def test_a_release_without_a_kernel_is_refused(tmp_path: Path, members: dict[str, bytes | str]) -> None:
    tar(tmp_path / "k.tar", members, "")
    with pytest.raises(SetupError, match="holds no"):
        kata.unpack(tmp_path / "k.tar", tmp_path / "vmlinux")


@pytest.mark.parametrize("suffix", [".tar.zst", ".tar.xz", ".tar.gz", ".tar"])
def test_a_damaged_release_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"kata{suffix}"
    path.write_bytes(b"this is not an archive at all" * 100)
    with pytest.raises(SetupError, match=r"damaged|zstd"):
        kata.unpack(path, tmp_path / "vmlinux")


# --- Firecracker


@pytest.fixture
def binary(tmp_path: Path) -> Callable[[str], Path]:
    def make(output: str) -> Path:
        path = tmp_path / "own/firecracker"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\necho '{output}'\n")
        path.chmod(0o755)
        return path

    return make


def test_a_binary_is_asked_for_its_version(binary: Callable[[str], Path]) -> None:
    path = binary("Firecracker v1.13.0-dev")
    found = firecracker.describe(path)
    assert (found.path, found.version, found.pinned) == (str(path), "1.13.0-dev", False)


@pytest.mark.parametrize(
    ("output", "words"), [("Firecracker v1.11.9", "too old"), ("v20.1.0", "not Firecracker"), ("", "not Firecracker")]
)
def test_a_binary_that_will_not_do(binary: Callable[[str], Path], output: str, words: str) -> None:
    with pytest.raises(SetupError, match=words):
        firecracker.describe(binary(output))


@pytest.mark.parametrize("content", [None, "#!/bin/sh\nexit 3\n", "garbage"])
def test_a_binary_that_does_not_run(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "firecracker"
    if content is not None:
        path.write_text(content)
        path.chmod(0o755)
    with pytest.raises(SetupError, match="does not run"):
        firecracker.describe(path)


def test_the_setting_comes_first_then_path(
    settings: Config, binary: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = binary("Firecracker v1.12.1")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert firecracker.users(settings) is None
    monkeypatch.setenv("PATH", str(own.parent))
    assert firecracker.users(settings) == own
    chosen = tmp_path / "chosen"
    chosen.write_text(own.read_text())
    chosen.chmod(0o755)
    assert firecracker.users(structs.replace(settings, firecracker=str(chosen))) == chosen
    with pytest.raises(SetupError):
        firecracker.users(structs.replace(settings, firecracker="/no/such/file"))
    binary("Firecracker v1.1.0")  # one on PATH that is too old is passed over
    assert firecracker.users(settings) is None


@pytest.mark.parametrize("named", ["{path}", "firecracker", "~/firecracker"])
def test_the_users_own_is_chosen_and_found_again(
    settings: Config, binary: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    path = binary("Firecracker v1.12.1")
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(path.parent))
    settings = structs.replace(settings, firecracker=named.format(path=path))
    layout = Layout(settings.base_dir)
    chosen = firecracker.build(settings, layout, progress.Silent())
    assert chosen.version == "1.12.1"
    assert index.firecracker(settings, layout.base) == chosen


# --- the guest image's recipe


@pytest.mark.parametrize("arch", ["amd64", "arm64"])
def test_the_recipes_script_is_one_that_a_shell_accepts(arch: str) -> None:
    script = recipe.script(arch)
    subprocess.run(["sh", "-n"], input=script.encode(), check=True)
    assert f"linux-image-cloud-{arch}" in script
    assert "{{" not in script
    assert "{files}" not in script


def test_no_mirror_is_named_unless_the_host_or_the_setting_names_one(
    settings: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest.sources, "read", list)
    assert guest.archive(settings) == []
    own = structs.replace(settings, debian_mirror="http://mirror.example/debian")
    assert guest.archive(own)[0] == "deb http://mirror.example/debian trixie main"


def test_a_failed_build_tells_network_trouble_from_others(settings: Config) -> None:
    lost = guest.explain(
        ["mmdebstrap"], 25, b"I: x\nE: Failed to fetch http://m/InRelease  Could not resolve\n", settings
    )
    assert "cannot be fetched" in lost.message
    assert "FCVM_DEBIAN_MIRROR" in (lost.hint or "")
    other = guest.explain(["mmdebstrap"], 25, b"I: x\nE: dpkg --install failed\nmore\n", settings)
    assert "dpkg --install failed" in other.message
    silent = guest.explain(["mmdebstrap"], -9, b"", settings)
    assert "SIGKILL" in silent.message


def test_what_two_builds_give_at_once_is_published_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, destination = tmp_path / "built", tmp_path / "kernels"
    built.mkdir()
    (built / "vmlinux").write_text("mine")
    rename = os.rename

    def too_late(source: Path, target: Path) -> None:
        destination.mkdir()
        (destination / "vmlinux").write_text("theirs")
        rename(source, target)

    monkeypatch.setattr(os, "rename", too_late)
    workspace.publish(built, destination)
    assert (destination / "vmlinux").read_text() == "theirs"
    assert not built.exists()
