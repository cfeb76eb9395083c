"""Setup as a whole, through the command: fetching from a server on loopback, without any network, killed, twice at once."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fcvm import config
from fcvm.config import Config
from fcvm.setup import build, index, kata, progress
from fcvm.storage.layout import Layout

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs namespaces of its own")

# `fcvm`, but without the assets that the host's own data directory may have.
FCVM = (
    "import sys; from pathlib import Path; from fcvm.cli.main import main; from fcvm.setup import assets; "
    "assets.SYSTEM_BASE = Path('/nonexistent'); sys.exit(main(sys.argv[1:]))"
)
COMMAND = (sys.executable, "-c", FCVM)
SOURCES = Path(config.__file__).parents[1]
TIMEOUT = 300
BUSYBOX = Path("/bin/busybox")


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` by path, counts requests, and holds answers back until ``released``."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.asked = threading.Event()
        self.released = threading.Event()
        self.released.set()
        self.cut_at: int | None = None

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.server.asked.set()
        self.server.released.wait(TIMEOUT)
        data = self.server.files.get(self.path)
        with contextlib.suppress(ConnectionError):  # the client was killed
            if data is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: self.server.cut_at])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def release(server: Server, tmp_path: Path) -> tuple[str, str]:
    """URL and SHA-256 of an archive on the server, laid out as a Kata Containers release."""
    plain = tmp_path / "kata-static-3.99.0-amd64.tar"
    with tarfile.open(plain, "w") as archive:
        share = f"./{kata.KATA_DIRECTORY}"
        member = tarfile.TarInfo(f"{share}/vmlinux-6.18.5-177")
        member.size = 1 << 20
        archive.addfile(member, io.BytesIO(b"\x7fELF" + bytes((1 << 20) - 4)))
        link = tarfile.TarInfo(f"{share}/vmlinux.container")
        link.type, link.linkname = tarfile.SYMTYPE, "vmlinux-6.18.5-177"
        archive.addfile(link)
    packed = subprocess.run(["zstd", "-q", "-c", plain], stdout=subprocess.PIPE, check=True).stdout
    server.files["/3.99.0/kata-static-3.99.0-amd64.tar.zst"] = packed
    return server.url("/3.99.0/kata-static-3.99.0-amd64.tar.zst"), hashlib.sha256(packed).hexdigest()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A data directory in which all but the kata kernel is set up, with small files in the place of large ones."""
    base = tmp_path / "base"
    settings = load(base)
    image = index.Image("1" * 16, "2" * 16, "6.12.1-cloud", "3" * 16, "trixie")
    parts = (f"guest/{image.id}/root.img", f"kernels/{image.kernel}/vmlinux", f"kernels/{image.kernel}/vmlinuz")
    for name in parts:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    modules = base / "kernels" / image.kernel / "modules" / image.kernel_version
    modules.mkdir(parents=True)
    names = [f"{name}.ko" for name in index.INITRD_MODULES]
    for name in names:
        (modules / name).write_text(name)
    (modules / "modules.dep").write_text("".join(f"{name}:\n" for name in names))
    (modules / "modules.builtin").write_text("")
    tools = base / "guest" / image.id / "tools"
    tools.mkdir()
    shutil.copy(BUSYBOX, tools / "busybox")
    (tools / "ld.so").write_text(f'#!/bin/sh\nshift 3\nunset PYTHONHOME\nexec {sys.executable} "$@"\n')
    (tools / "ld.so").chmod(0o755)
    index.image_pointer(settings, base).write_text(index.to_json(image))
    own = tmp_path / "firecracker"
    own.write_text("#!/bin/sh\necho Firecracker v1.12.1\n")
    own.chmod(0o755)
    return base


def load(base: Path, **overrides: object) -> Config:
    values = {"base_dir": base, "firecracker": str(base.parent / "firecracker"), **overrides}
    return config.load(values, env={"FCVM_CONFIG": str(base.parent / "none.toml")})


def environment(base: Path, **settings: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("FCVM_")}
    env |= {"PYTHONPATH": str(SOURCES), "FCVM_CONFIG": str(base.parent / "none.toml"), "FCVM_BASE_DIR": str(base)}
    return env | {f"FCVM_{name.upper()}": value for name, value in settings.items()}


def setup(base: Path, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`fcvm setup`; see ``fcvm``."""
    return fcvm(base, "setup", *args, **options)


def fcvm(
    base: Path, *args: str, prefix: tuple[str, ...] = (), timeout: float = TIMEOUT, **settings: str
) -> subprocess.CompletedProcess[str]:
    """`fcvm ARGS` with these settings; ``prefix`` is a command that runs it."""
    return subprocess.run(
        [*prefix, *COMMAND, *args],
        env=environment(base, **settings),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def kata_settings(base: Path, release: tuple[str, str]) -> dict[str, str]:
    url, sha256 = release
    own = str(base.parent / "firecracker")
    return {"kernel_profile": "kata", "kernel_url": url, "kernel_sha256": sha256, "firecracker": own}


def left_over(base: Path) -> list[str]:
    """What a build has left that is not finished: work directories, temporary names."""
    found = [path for path in (base / "cache").glob("build-*") if path.suffix != ".lock"]
    return [str(path) for path in (*found, *base.rglob("*.creating"))]


def test_the_kata_kernel_is_fetched_verified_and_found(base: Path, server: Server, release: tuple[str, str]) -> None:
    done = setup(base, **kata_settings(base, release))
    assert done.returncode == 0, done.stderr
    assert "Kata kernel: done" in done.stderr
    found = build.assets.find(load(base, **kata_settings(base, release)), Layout(base))
    assert found.vmlinux.stat().st_size == 1 << 20
    assert found.initrd != found.machine_initrd
    assert len(server.requests) == 1
    assert left_over(base) == []

    again = setup(base, **kata_settings(base, release))
    assert again.returncode == 0
    assert "Kata kernel" not in again.stderr
    assert len(server.requests) == 1


def test_a_run_sets_up_what_is_missing_if_it_is_asked_to(base: Path, release: tuple[str, str]) -> None:
    settings = {**kata_settings(base, release), "machine": "always"}
    words = ("podman", "run", "--setup", f"dir:{base}/none")  # an error that comes behind set-up
    plain = fcvm(base, *words[:2], words[3], **settings)
    assert (plain.returncode, plain.stderr.splitlines()[-1]) == (125, "hint: fcvm setup")
    done = fcvm(base, *words, **settings)
    assert done.returncode == 125
    assert "Kata kernel: done" in done.stderr
    assert f"{base}/none" in done.stderr
    assert "hint: fcvm setup" not in done.stderr
    build.assets.find(load(base, **settings), Layout(base))


def test_a_wrong_checksum_is_refused(base: Path, release: tuple[str, str]) -> None:
    done = setup(base, **kata_settings(base, (release[0], "0" * 64)))
    assert done.returncode == 125
    assert f"{release[0]} is not the file expected" in done.stderr
    assert not list((base / "kernels").glob("*.json"))
    assert left_over(base) == []


def test_a_missing_archive_is_named(base: Path, server: Server, release: tuple[str, str]) -> None:
    url = server.url("/gone.tar.zst")
    done = setup(base, **kata_settings(base, (url, release[1])))
    assert done.returncode == 125
    assert f"{url} cannot be fetched" in done.stderr
    assert "404" in done.stderr
    assert "FCVM_KERNEL_URL=file:///PATH" in done.stderr


def test_a_transfer_that_breaks_off_is_refused(base: Path, server: Server, release: tuple[str, str]) -> None:
    server.cut_at = 100
    done = setup(base, **kata_settings(base, release))
    assert done.returncode == 125
    assert "cannot be fetched" in done.stderr
    assert left_over(base) == []


def test_a_file_from_a_stick_will_do(base: Path, tmp_path: Path, server: Server, release: tuple[str, str]) -> None:
    stick = tmp_path / "kernel.tar.zst"
    stick.write_bytes(next(iter(server.files.values())))
    done = setup(base, **kata_settings(base, (f"file://{stick}", release[1])))
    assert done.returncode == 0, done.stderr
    assert server.requests == []


def test_two_at_once_fetch_once(base: Path, server: Server, release: tuple[str, str]) -> None:
    server.released.clear()
    waiting = threading.Event()

    class Step:
        def update(self, done: int, total: int | None = None) -> None:
            pass

        def note(self, text: str) -> None:
            if text == "waiting for another fcvm":
                waiting.set()

    class Progress:
        @contextlib.contextmanager
        def step(self, title: str) -> Iterator[progress.Step]:
            yield Step()

    settings = load(base, **kata_settings(base, release))
    errors: list[BaseException] = []
    results: list[index.Kata] = []

    def run() -> None:
        try:
            results.append(kata.build(settings, Layout(base), Progress()))
        except BaseException as error:
            errors.append(error)

    first, second = threading.Thread(target=run), threading.Thread(target=run)
    first.start()
    assert server.asked.wait(TIMEOUT)
    second.start()
    assert waiting.wait(TIMEOUT)
    server.released.set()
    first.join(TIMEOUT)
    second.join(TIMEOUT)
    assert errors == []
    assert results[0] == results[1]
    assert len(server.requests) == 1


def test_killed_while_fetching_nothing_is_half_made(base: Path, server: Server, release: tuple[str, str]) -> None:
    server.released.clear()
    settings = kata_settings(base, release)
    with subprocess.Popen((*COMMAND, "setup"), env=environment(base, **settings), stderr=subprocess.DEVNULL) as process:
        assert server.asked.wait(TIMEOUT)
        process.kill()
    assert left_over(base)  # the work directory of the killed one
    assert not list((base / "kernels").glob("*.json"))
    server.released.set()
    done = setup(base, **settings)
    assert done.returncode == 0, done.stderr
    assert left_over(base) == []


def test_interrupted_it_cleans_up_and_says_nothing_more(base: Path, server: Server, release: tuple[str, str]) -> None:
    server.released.clear()
    settings = kata_settings(base, release)
    with subprocess.Popen(
        (*COMMAND, "setup"), env=environment(base, **settings), stderr=subprocess.PIPE, text=True
    ) as process:
        assert server.asked.wait(TIMEOUT)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert left_over(base) == []


NO_NETWORK = ("unshare", "--net")


def test_without_network_the_firecracker_error_says_how_to_provide_it(tmp_path: Path) -> None:
    base = Layout(tmp_path / "base").cache.parent  # not empty, so no btrfs is made for it
    done = setup(base, prefix=(*NO_NETWORK, "env", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"))
    assert done.returncode == 125
    assert "Firecracker" in done.stderr
    assert "releases/download/v" in done.stderr
    assert "FCVM_FIRECRACKER=/PATH" in done.stderr
    assert "Traceback" not in done.stderr
    assert left_over(base) == []


def test_without_network_the_guest_image_error_says_how_to_provide_it(base: Path) -> None:
    for pointer in (base / "guest").glob("*.json"):
        pointer.unlink()
    done = setup(base, prefix=NO_NETWORK, firecracker=str(base.parent / "firecracker"), debian_suite="forky")
    assert done.returncode == 125
    assert "The guest image's packages (forky) cannot be fetched from" in done.stderr
    assert "FCVM_DEBIAN_MIRROR" in done.stderr
    assert "fcvm setup --from DIRECTORY" in done.stderr
    assert left_over(base) == []
    assert not list((base / "guest").glob("*.json"))


def test_killed_while_debootstrapping_nothing_goes_on(base: Path, server: Server) -> None:
    """mmdebstrap works in namespaces of its own: when fcvm is killed, all of it dies, and no mount is left."""
    server.released.clear()  # the mirror never answers
    settings = {"debian_mirror": server.url("/debian"), "firecracker": str(base.parent / "firecracker")}
    for pointer in (base / "guest").glob("*.json"):
        pointer.unlink()
    with subprocess.Popen((*COMMAND, "setup"), env=environment(base, **settings), stderr=subprocess.DEVNULL) as process:
        assert server.asked.wait(TIMEOUT)
        children = processes_in(base)
        assert children
        process.kill()
    for pid in children:
        wait_for_end(pid)
    assert processes_in(base) == []
    with open("/proc/self/mounts") as mounts:
        assert str(base) not in mounts.read()
    assert not list((base / "guest").glob("*.json"))
    server.released.set()  # now it answers 404
    done = setup(base, **settings)
    assert done.returncode == 125
    assert "cannot be fetched" in done.stderr
    assert left_over(base) == []


def processes_in(base: Path) -> list[int]:
    """Other processes whose command line names ``base``, and all their descendants that are mmdebstrap's."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if str(base).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def wait_for_end(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], TIMEOUT)[0], f"process {pid} goes on"
    finally:
        os.close(fd)


def test_assets_are_copied_from_another_data_directory(base: Path, tmp_path: Path) -> None:
    own = str(base.parent / "firecracker")
    other = Layout(tmp_path / "other").cache.parent
    done = setup(other, "--from", str(base), prefix=NO_NETWORK, firecracker=own)
    assert done.returncode == 0, done.stderr
    found = build.assets.find(load(other, firecracker=own), Layout(other))
    assert found.root_image.is_relative_to(other)
    assert json.loads(found.to_json())["kernel_version"] == "6.12.1-cloud"
    assert left_over(other) == []
    refused = setup(other, "--from", str(tmp_path), prefix=NO_NETWORK, firecracker=own)
    assert refused.returncode == 125
    assert "holds no guest image" in refused.stderr
