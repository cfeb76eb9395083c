"""Images in files of every kind that skopeo knows, through the command line, as the kernel sees the result."""

import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from urllib.parse import unquote

import pytest
from images_support import CONFIG, archive, image, lower

from fcvm import process
from fcvm.errors import ImageError
from fcvm.images import resolve, skopeo, store
from fcvm.storage.layout import Layout

SOURCE = Path(__file__).parent.parent.parent / "src"
FOREIGN = "s390x"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "base")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of the test's own: skopeo keeps its caches there, and nothing of the user's is read."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def fcvm(layout: Layout, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "FCVM_BASE_DIR": str(layout.base), "FCVM_CONFIG": "/dev/null"}
    command = [sys.executable, "-m", "fcvm", *words]
    return subprocess.run(command, env=environment | (env or {}), capture_output=True, text=True, timeout=300)


def left(layout: Layout) -> list[str]:
    """What is in the store and in its scratch space besides locks and names."""
    files = [*layout.images.glob("[!.]*"), *(layout.cache / "images").glob("*")]
    return sorted(path.name for path in files if path.name != "names.json")


def seen_by_the_kernel(disk: Path) -> dict[str, list[object]]:
    """The disk mounted, and its layers joined by overlayfs as Podman does; in mounts that end with the process."""
    script = """
import json, os, subprocess, sys
disk, at = sys.argv[1:]
os.makedirs(at + "/disk"); os.makedirs(at + "/merged")
subprocess.run(["mount", "-t", "erofs", "-o", "ro,loop", disk, at + "/disk"], check=True)
os.chdir(at + "/disk/overlay")
layers = json.load(open("../overlay-layers/layers.json"))
top = layers[-1]["id"]
lower = ":".join(["l/" + open(top + "/link").read()] + open(top + "/lower").read().split(":"))
subprocess.run(["mount", "-t", "overlay", "-o", "ro,lowerdir=" + lower, "none", at + "/merged"], check=True)
found = {}
for directory, names, files in os.walk(at + "/merged"):
    for name in [".", *names, *files]:
        path = os.path.normpath(os.path.join(directory, name))
        s = os.lstat(path)
        content = ""
        if os.path.islink(path): content = os.readlink(path)
        elif os.path.isfile(path): content = open(path, encoding="latin-1").read()[-20:]
        xattrs = [] if os.path.islink(path) else os.listxattr(path)
        found[os.path.relpath(path, at + "/merged")] = [s.st_mode, s.st_uid, s.st_gid, s.st_nlink, content, s.st_rdev, s.st_mtime_ns, xattrs]
print(json.dumps(found))
"""
    at = Path(tempfile.mkdtemp(dir=disk.parent.parent))
    done = process.run(["unshare", "--mount", "--", sys.executable, "-c", script, disk, at])
    return dict(json.loads(done.stdout))


def check(image: store.Image) -> None:
    """The image of images_support is what the kernel sees."""
    assert {name: image.config[name] for name in CONFIG} == CONFIG
    seen = seen_by_the_kernel(image.path)
    assert "etc/gone" not in seen
    assert "replaced/old" not in seen
    assert seen["replaced/young"][4] == "young"
    assert seen["etc/new"][4] == "new"
    assert seen["etc/kept"][:5] == [stat.S_IFREG | 0o640, 7, 8, 1, "kept"]
    assert seen["etc"][:3] == [stat.S_IFDIR | 0o750, 7, 8]
    assert seen["tmp"][0] == stat.S_IFDIR | 0o1777
    assert seen["bin/tool"][:4] == seen["bin/same"][:4] == [stat.S_IFREG | 0o4755, 0, 0, 2]
    assert seen["bin/sh"][4] == "tool"
    assert seen["bin/ping"][7] == ["security.capability"]
    assert (seen["dev/null"][0], seen["dev/null"][5]) == (stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert stat.S_ISFIFO(int(str(seen["dev/pipe"][0])))
    assert (str(seen["large"][4])[-3:], seen["large"][6]) == ("end", 1700000000_123456789)
    assert seen["h\u00e4\u00df lich\n"][4] == "odd"
    assert seen["empty"][4] == "no more"


FORMATS = {
    "docker-archive": [],
    "oci-archive": [],
    "oci": [],
    "dir": [],
    "dir compressed": ["--dest-compress"],
    "oci zstd": ["--dest-compress-format=zstd"],
}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_that_skopeo_writes(tmp_path: Path, home: Path, layout: Layout, format: str) -> None:
    transport = format.partition(" ")[0]
    target = f"{transport}:{tmp_path}/copy" + (":localhost/a:1" if transport != "dir" else "")
    # From the same kind: skopeo leaves the health check out when it makes an OCI image of a Docker one.
    source = f"{'oci' if transport.startswith('oci') else 'docker'}-archive:{image(tmp_path / 'a.tar')}"
    process.run(["skopeo", "--insecure-policy", "copy", *FORMATS[format], source, target])
    done = fcvm(layout, "images", "load", str(tmp_path / "copy"), "--name", "x")
    assert (done.returncode, done.stdout) == (0, "localhost/x:latest\n"), done.stderr
    check(resolve.ensure("localhost/x", layout=layout))
    reference = f"{transport}:{tmp_path}/copy"
    check_again = resolve.ensure(reference, layout=layout)
    assert check_again.key == resolve.ensure("x", layout=layout).key
    assert left(layout) == sorted([f"{check_again.key}.img", f"{check_again.key}.json"])


class Daemon(BaseHTTPRequestHandler):
    """As much of a Docker daemon as says which image a name stands for, and saves it: the file ``saved``, if that is there."""

    saved: Path
    saves = 0

    def do_HEAD(self) -> None:
        self.answer(b"OK")

    def do_GET(self) -> None:
        path = re.sub("^/v[0-9.]+", "", unquote(self.path))
        content = self.saved.read_bytes() if self.saved.exists() else b""
        if path.endswith("_ping"):
            self.answer(b"OK")
        elif not content or "localhost/a:1" not in path:
            self.answer(b'{"message": "No such image"}', 404)
        elif path == "/images/localhost/a:1/json":
            self.answer(json.dumps({"Id": f"sha256:{hashlib.sha256(content).hexdigest()}"}).encode())
        elif path == "/images/get?names=localhost/a:1":
            type(self).saves += 1
            self.answer(content)

    def answer(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("API-Version", "1.41")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: object) -> None:
        pass


def test_an_image_of_the_docker_daemon(tmp_path: Path, home: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Daemon, "saved", tmp_path / "a.tar", raising=False)
    monkeypatch.setattr(Daemon, "saves", 0)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    with ThreadingUnixStreamServer(f"{tmp_path}/docker.sock", Daemon) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(ImageError, match="has no image localhost/a:1"):
                resolve.ensure("docker-daemon:localhost/a:1", layout=layout)
            image(Daemon.saved, "localhost/a:1")
            made = resolve.ensure("docker-daemon:localhost/a:1", layout=layout)
            assert resolve.ensure("docker-daemon:localhost/a:1", layout=layout) == made
            assert Daemon.saves == 1
            image(Daemon.saved, "localhost/a:1", layers=[lower()])
            assert resolve.ensure("docker-daemon:localhost/a:1", layout=layout).key != made.key
        finally:
            server.shutdown()
            thread.join()
    check(made)


def test_the_kernel_and_the_checker_agree_on_a_real_tree(tmp_path: Path, home: Path, layout: Layout) -> None:
    """A layer made by GNU tar of this interpreter's library: what is in the image is what is on this host."""
    tree = Path(os.__file__).parent
    tar = process.run(["tar", "-c", "--exclude=site-packages", "-C", tree, "."]).stdout
    archive.write(tmp_path / "a.tar", [tar], {}, names=["localhost/lib:1"], architecture=skopeo.architecture())
    made = resolve.ensure(f"docker-archive:{tmp_path}/a.tar", layout=layout)
    process.run(["fsck.erofs", made.path])
    script = 'mount -o ro,loop "$0" "$1" && diff -r --no-dereference --exclude=site-packages "$2" "$1"/overlay/l/0/'
    (tmp_path / "at").mkdir()
    process.run(["unshare", "--mount", "sh", "-c", script, made.path, tmp_path / "at", tree])


def test_an_image_of_very_many_layers(tmp_path: Path, home: Path, layout: Layout) -> None:
    """127, as many as Docker allows: the names of the lower layers must fit into one mount option."""
    layers = [lower(), *(archive.layer([archive.File(f"layer-{n}", b"%d" % n)]) for n in range(126))]
    image(tmp_path / "a.tar", layers=layers)
    made = resolve.ensure(f"docker-archive:{tmp_path}/a.tar", layout=layout)
    seen = seen_by_the_kernel(made.path)
    assert {f"layer-{n}" for n in range(126)} <= set(seen)
    assert len(":".join(f"/images/overlay/l/{n:X}" for n in range(127))) < 4000


def test_names_in_the_archive_are_used(tmp_path: Path, home: Path, layout: Layout) -> None:
    done = fcvm(layout, "images", "load", str(image(tmp_path / "a.tar", "localhost/a:1", "quay.io/b:2")))
    assert done.returncode == 0, done.stderr
    assert sorted(store.names(layout)) == ["localhost/a:1", "quay.io/b:2"]
    listed = json.loads(fcvm(layout, "images", "ls", "--json").stdout)
    assert [entry["names"] for entry in listed] == [["localhost/a:1", "quay.io/b:2"]]
    assert fcvm(layout, "images", "ls").stdout.count(listed[0]["id"][7:19]) == 2


def test_loading_without_any_name(tmp_path: Path, home: Path, layout: Layout) -> None:
    done = fcvm(layout, "images", "load", str(image(tmp_path / "a.tar")))
    assert done.returncode == 125
    assert "hint: fcvm images load" in done.stderr
    assert left(layout) == []


def test_one_of_several_images(tmp_path: Path, home: Path, layout: Layout) -> None:
    for name in ("one", "two"):
        single = tmp_path / f"{name}.tar"
        image(single, layers=[lower(), archive.layer([archive.File(name, b"")])])
        process.run(["skopeo", "--insecure-policy", "copy", f"docker-archive:{single}", f"oci:{tmp_path}/both:{name}"])
    for name in ("one", "two"):
        made = resolve.ensure(f"oci:{tmp_path}/both:{name}", layout=layout)
        assert name in seen_by_the_kernel(made.path)
    assert fcvm(layout, "images", "load", str(tmp_path / "both"), "--name", "x").returncode == 125
    with pytest.raises(ImageError, match="the one image"):
        resolve.ensure(f"oci:{tmp_path}/both:three", layout=layout)
    with pytest.raises(ImageError, match="the one image"):
        resolve.ensure(f"docker-archive:{tmp_path}/one.tar:three", layout=layout)


@pytest.mark.parametrize("words", [["pull", "docker-archive:{}"], ["load", "{}", "--name", "x"], ["load", "oci-archive:{}", "--name", "x"]])
@pytest.mark.parametrize("keep", [0, 300, 3000, 500_000])
def test_a_corrupt_archive(tmp_path: Path, home: Path, layout: Layout, words: list[str], keep: int) -> None:
    path = image(tmp_path / "a.tar")
    path.write_bytes(path.read_bytes()[:keep])
    done = fcvm(layout, "images", *(word.format(path) for word in words))
    assert done.returncode == 125
    assert str(path) in done.stderr
    assert "hint: " in done.stderr
    assert "level=" not in done.stderr
    assert "Traceback" not in done.stderr
    assert left(layout) == []


def test_a_layer_of_another_image(tmp_path: Path, home: Path, layout: Layout) -> None:
    """An archive that is well-formed, but whose layer is not what the configuration names."""
    path = image(tmp_path / "a.tar")
    path.write_bytes(path.read_bytes().replace(b"kept", b"KEPT"))
    done = fcvm(layout, "images", "load", str(path), "--name", "x")
    assert done.returncode == 125
    assert "damaged" in done.stderr
    assert left(layout) == []


def test_an_image_for_another_architecture(tmp_path: Path, home: Path, layout: Layout) -> None:
    path = image(tmp_path / "a.tar", "localhost/a:1", architecture=FOREIGN)
    for words in (["load", str(path)], ["pull", f"docker-archive:{path}"], ["pull", f"oci-archive:{path}"]):
        done = fcvm(layout, "images", *words)
        assert done.returncode == 125
        assert f"is for linux/{FOREIGN}, and this host runs {skopeo.architecture()}" in done.stderr
    assert left(layout) == []


def test_files_that_are_not_there(tmp_path: Path, home: Path, layout: Layout) -> None:
    for reference in (f"docker-archive:{tmp_path}/none", f"oci:{tmp_path}/none", f"dir:{tmp_path}/none"):
        done = fcvm(layout, "images", "pull", reference)
        assert (done.returncode, f"There is no image at {tmp_path}/none." in done.stderr) == (125, True)
    assert fcvm(layout, "images", "load", f"{tmp_path}/none", "--name", "x").returncode == 125


def test_a_changed_archive_is_read_again(tmp_path: Path, home: Path, layout: Layout) -> None:
    path = image(tmp_path / "a.tar")
    reference = f"docker-archive:{path}"
    first = resolve.ensure(reference, layout=layout)
    assert resolve.ensure(reference, layout=layout) == first
    image(path, layers=[lower()])
    assert resolve.ensure(reference, layout=layout, pull="never") == first
    second = resolve.ensure(reference, layout=layout)
    assert second.id != first.id
    assert [names for _, names in store.images(layout)] == [[reference], []]


def test_what_is_here_needs_no_program(tmp_path: Path, home: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    path = image(tmp_path / "a.tar", "localhost/a:1")
    assert fcvm(layout, "images", "load", str(path)).returncode == 0
    made = resolve.ensure(f"docker-archive:{path}", layout=layout)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    for reference in ("localhost/a:1", "a:1", f"docker-archive:{path}", made.id, made.id[7:19]):
        for pull in ("missing", "never", "always") if reference.endswith("a:1") else ("missing", "never"):
            assert resolve.ensure(reference, layout=layout, pull=pull).key == made.key


def test_a_full_data_directory(tmp_path: Path, home: Path, layout: Layout) -> None:
    path = image(tmp_path / "a.tar", layers=[lower(), archive.layer([archive.File("big", os.urandom(3 << 20))])])
    script = f"""
mount -t tmpfs -o size=$1 none {layout.base} || exit 9
{sys.executable} -m fcvm images load {path} --name x; code=$?
find {layout.base} -name '*.img'; find {layout.base}/cache/images -mindepth 1
exit $code
"""
    layout.base.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "FCVM_BASE_DIR": str(layout.base), "FCVM_CONFIG": "/dev/null"}
    for size in ("2m", "6m"):  # full while skopeo writes, and while we do
        command = ["unshare", "--mount", "sh", "-c", script, "sh", size]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stdout) == (125, ""), done.stderr
        assert "There is no space left" in done.stderr
        assert "hint: fcvm images prune" in done.stderr


def test_two_at_once(tmp_path: Path, home: Path, layout: Layout) -> None:
    path = image(tmp_path / "a.tar")
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "FCVM_BASE_DIR": str(layout.base), "FCVM_CONFIG": "/dev/null"}
    command = [sys.executable, "-m", "fcvm", "images", "pull", f"docker-archive:{path}"]
    running = [subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) for _ in range(4)]
    outputs = [child.communicate(timeout=300) for child in running]
    assert [child.returncode for child in running] == [0] * 4, outputs
    assert len({out for out, _ in outputs}) == 1
    assert sum("Fetching" in err for _, err in outputs) == 1
    assert len(left(layout)) == 2


@pytest.mark.parametrize("title", ["Fetching", "Converting"])
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_killed_on_the_way(tmp_path: Path, home: Path, layout: Layout, title: str, blow: signal.Signals) -> None:
    """It is stopped for good within a step; what it leaves is gone with the next image, and nothing counts as there."""
    path = image(tmp_path / "a.tar")
    script = f"""
import contextlib, signal, sys
from pathlib import Path
from fcvm.images import resolve
from fcvm.storage.layout import Layout

class Here:
    def __init__(self, title): self.title = title
    def note(self, text): pass
    def update(self, done, total=None):
        if self.title.startswith({title!r}):
            print("here", flush=True)
            signal.pause()

class Progress:
    @contextlib.contextmanager
    def step(self, title): yield Here(title)

resolve.ensure(sys.argv[1], layout=Layout(Path(sys.argv[2])), progress=Progress())
"""
    command = [sys.executable, "-c", script, f"docker-archive:{path}", str(layout.base)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(SOURCE)}, stdout=-1, stderr=-1) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        child.send_signal(blow)
        child.communicate(timeout=60)
        assert child.returncode != 0
    assert list(store.images(layout)) == []
    assert bool(left(layout)) is (blow == signal.SIGKILL)
    made = resolve.ensure(f"docker-archive:{path}", layout=layout)
    assert left(layout) == [f"{made.key}.img", f"{made.key}.json"]


def test_prune_removes_what_a_kill_left(tmp_path: Path, home: Path, layout: Layout) -> None:
    scratch = layout.cache / "images/tmp123"
    scratch.mkdir(parents=True)
    (scratch / "blob").write_bytes(b"x")
    done = fcvm(layout, "images", "prune")
    assert (done.returncode, done.stdout) == (0, "")
    assert left(layout) == []


def test_rm_and_prune(tmp_path: Path, home: Path, layout: Layout) -> None:
    path = image(tmp_path / "a.tar", "localhost/a:1", "localhost/b:1")
    assert fcvm(layout, "images", "load", str(path)).returncode == 0
    done = fcvm(layout, "images", "rm", "a:1", "nothing")
    assert (done.returncode, done.stdout) == (125, "untagged localhost/a:1\n")
    assert "There is no image nothing." in done.stderr
    image(path, "localhost/b:1", layers=[lower()])
    assert fcvm(layout, "images", "load", str(path)).returncode == 0
    [old] = [found for found, names in store.images(layout) if not names]
    assert fcvm(layout, "images", "prune").stdout == f"{old.id[7:]}\n"
    assert [names for _, names in store.images(layout)] == [["localhost/b:1"]]
    assert fcvm(layout, "images", "rm", "localhost/b:1").stdout == "removed localhost/b:1\n"
    assert left(layout) == []


def storage_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "storage.conf"
    conf.write_text(f'[storage]\ndriver="overlay"\ngraphroot="{tmp_path}/graph"\nrunroot="{tmp_path}/run"\n')
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(conf))


def test_localhost_names_of_the_users_podman(
    tmp_path: Path, home: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage_conf(tmp_path, monkeypatch)

    def podman_build(*layers: bytes) -> str:
        path = image(tmp_path / "a.tar", layers=list(layers) or None)
        process.run(["unshare", "--mount", "skopeo", "--insecure-policy", "copy", f"docker-archive:{path}",
                     "containers-storage:localhost/built:latest"],
                    env={"CONTAINERS_STORAGE_CONF": os.environ["CONTAINERS_STORAGE_CONF"]})  # fmt: skip
        with (tmp_path / "graph/overlay-images/images.json").open() as file:
            return str(json.load(file)[0]["id"])

    with pytest.raises(ImageError, match="There is no image localhost/built here"):
        resolve.ensure("localhost/built", layout=layout)
    assert not (tmp_path / "graph").exists()
    mounts = Path("/proc/self/mounts").read_text()
    id = podman_build()
    made = resolve.ensure("localhost/built", layout=layout)
    assert made.id == f"sha256:{id}"
    check(made)
    assert resolve.ensure("containers-storage:localhost/built", layout=layout).id == made.id
    assert Path("/proc/self/mounts").read_text() == mounts
    assert resolve.ensure("built", layout=layout, pull="never").key == made.key
    podman_build(lower())
    assert resolve.ensure("localhost/built", layout=layout).id != made.id  # built again: the new one
    assert fcvm(layout, "images", "load", str(image(tmp_path / "b.tar")), "--name", "built").returncode == 0
    assert resolve.ensure("localhost/built", layout=layout).id == made.id  # a loaded image comes first


def test_the_configuration_of_the_demo_image(tmp_path: Path, home: Path, layout: Layout) -> None:
    build = Path(archive.__file__).parent / "build"
    environment = {**os.environ, "FCVM_BASE_DIR": str(layout.base), "FCVM_CONFIG": "/dev/null"}
    done = subprocess.run([sys.executable, build, "demo"], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "localhost/fcvm-demo:latest\n"), done.stderr
    made = resolve.ensure("fcvm-demo", layout=layout)
    assert (made.config["Cmd"], made.config["WorkingDir"]) == (["sh"], "/root")
    again = tmp_path / "again.tar"
    subprocess.run([sys.executable, build, "demo", "--output", str(again)], env=environment, check=True, capture_output=True)
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(next((layout.cache / "examples").glob("demo-*.tar")).read_bytes()).digest()


def test_a_file_whose_name_is_no_text(layout: Layout, home: Path, tmp_path: Path) -> None:
    path = image(tmp_path / "a.tar").rename(tmp_path / os.fsdecode(b"\xff.tar"))
    made = resolve.ensure(f"docker-archive:{path}", layout=layout)
    assert store.names(layout)[f"docker-archive:{path}"].key == made.key
