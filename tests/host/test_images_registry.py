"""Images from a real registry server (Debian's docker-registry) on loopback."""

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from images_support import archive, image, lower

from fcvm import process
from fcvm.errors import ImageError
from fcvm.images import resolve, skopeo, store
from fcvm.images.store import Image
from fcvm.storage.layout import Layout

LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
# "secret", by bcrypt with the least rounds
PASSWORD = "user:$2b$04$Fb4jXElZzw42wCrxF0jmteoeOpFBv0p.PLj2s1J9DLGXBFjeTUiZe\n"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "base")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, so that nothing of the user's configuration is read."""
    home = tmp_path / "home"
    (home / ".config/containers").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_RUNTIME_DIR", "REGISTRY_AUTH_FILE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return home


@contextmanager
def running(directory: Path, extra: str = "") -> Iterator[str]:
    """A registry that keeps its images in ``directory``; yields its host and port."""
    directory.mkdir(exist_ok=True)
    configuration = directory / "config.yml"
    configuration.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {directory}/data}}}}\nhttp: {{addr: '127.0.0.1:0'}}\n"
        f"log: {{level: info}}\n{extra}"
    )
    command = [process.find("docker-registry"), "serve", str(configuration)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server:
        assert server.stderr is not None
        try:
            for line in server.stderr:
                if matched := re.search(r"listening on (127\.0\.0\.1:\d+)", line):
                    break
            else:
                raise AssertionError("the registry did not start")
            # Whatever it says from here on must be read, or it blocks.
            with subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL):
                try:
                    yield matched[1]
                finally:
                    server.kill()
        finally:
            server.kill()


def trust(home: Path, address: str, extra: str = "") -> None:
    """Let skopeo speak plain HTTP to the registry, as a user would in registries.conf."""
    text = f'{extra}\n[[registry]]\nlocation = "{address}"\ninsecure = true\n'
    (home / ".config/containers/registries.conf").write_text(text)


@pytest.fixture
def registry(tmp_path: Path, home: Path) -> Iterator[str]:
    with running(tmp_path / "registry") as address:
        trust(home, address)
        yield address


def push(address: str, name: str, *layers: bytes, creds: str = "", path: Path, architecture: str = skopeo.architecture()) -> str:
    """Push an image and return its manifest's digest."""
    archive.write(path, list(layers) or [lower()], {"Cmd": ["sh"]}, names=[], architecture=architecture)
    digest = path.with_suffix(".digest")
    more = [f"--dest-creds={creds}"] if creds else []
    command = ["skopeo", "--insecure-policy", "copy", f"--digestfile={digest}", "--dest-tls-verify=false", *more]
    process.run([*command, f"docker-archive:{path}", f"docker://{address}/{name}"])
    return digest.read_text()


@pytest.fixture
def pushed(registry: str, tmp_path: Path) -> Callable[..., str]:
    return lambda name, *layers, **more: push(registry, name, *layers, path=tmp_path / "pushed.tar", **more)


def version(number: int) -> bytes:
    return archive.layer([archive.File("version", b"%d" % number)])


def names(layout: Layout) -> list[list[str]]:
    return [called for _, called in store.images(layout)]


def test_pull_and_its_policies(registry: str, pushed: Callable[..., str], layout: Layout) -> None:
    name = f"{registry}/org/x:1"
    with pytest.raises(ImageError, match="There is no image"):
        resolve.ensure(name, pull="never", layout=layout)
    one = pushed("org/x:1", lower(), version(1))
    first = resolve.ensure(name, layout=layout)
    assert (first.digest, first.reference, first.architecture) == (one, name, skopeo.architecture())
    two = pushed("org/x:1", lower(), version(2))
    for pull in ("missing", "never"):
        assert resolve.ensure(name, pull=pull, layout=layout).digest == one
    second = resolve.ensure(name, pull="newer", layout=layout)
    assert second.digest == two
    assert names(layout) == [[name], []]
    pushed("org/x:1", lower(), version(1))
    inode = first.path.stat().st_ino
    third = resolve.ensure(name, pull="always", layout=layout)
    assert (third.digest, third.path.stat().st_ino) == (one, inode)  # it was here: only the name moved
    assert resolve.ensure(f"{registry}/org/x@{two}", layout=layout).digest == two


def test_a_registry_that_is_gone(tmp_path: Path, home: Path, layout: Layout) -> None:
    with running(tmp_path / "registry") as address:
        trust(home, address)
        push(address, "x", path=tmp_path / "a.tar")
        made = resolve.ensure(f"{address}/x", layout=layout)
    for pull in ("missing", "newer", "never"):
        assert resolve.ensure(f"{address}/x", pull=pull, layout=layout) == made
    with pytest.raises(ImageError, match=f"The registry {address} cannot be reached: connection refused") as caught:
        resolve.ensure(f"{address}/x", pull="always", layout=layout)
    assert "fcvm images load" in (caught.value.hint or "")
    with pytest.raises(ImageError, match="cannot be reached"):
        resolve.ensure(f"{address}/y", layout=layout)
    assert sorted(path.suffix for path in layout.images.glob("[!.]*")) == [".img", ".json", ".json"]


def test_a_server_that_is_no_registry(home: Path, layout: Layout) -> None:
    script = "import socket, sys\nserver = socket.socket(fileno=int(sys.argv[1]))\nwhile True: server.accept()[0].close()"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        trust(home, address)
        command = [sys.executable, "-c", script, str(server.fileno())]
        with subprocess.Popen(command, pass_fds=[server.fileno()]) as hangs_up:
            try:
                with pytest.raises(ImageError, match=f"The registry {address}"):
                    resolve.ensure(f"{address}/x", layout=layout)
            finally:
                hangs_up.kill()


def test_plain_http_needs_to_be_allowed(registry: str, home: Path, layout: Layout) -> None:
    (home / ".config/containers/registries.conf").write_text("")
    with pytest.raises(ImageError, match="speaks plain HTTP") as caught:
        resolve.ensure(f"{registry}/x", layout=layout)
    assert "insecure=true" in (caught.value.hint or "")


def test_what_the_registry_does_not_have(registry: str, pushed: Callable[..., str], layout: Layout) -> None:
    pushed("x:1")
    for name in (f"{registry}/x:2", f"{registry}/nothing", f"{registry}/x@sha256:{'0' * 64}"):
        with pytest.raises(ImageError, match=f"The registry {registry} has no image {name}") as caught:
            resolve.ensure(name, layout=layout)
        assert "skopeo list-tags" in (caught.value.hint or "")
    assert not list((layout.base / "images").glob("*.img"))


@pytest.mark.parametrize("file", ["home/.docker/config.json", "auth.json"])  # as docker login and podman login write
def test_a_registry_that_wants_a_password(
    tmp_path: Path, home: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    (tmp_path / "htpasswd").write_text(PASSWORD)
    credentials = tmp_path / file
    credentials.parent.mkdir(exist_ok=True)
    with running(tmp_path / "registry", f"auth: {{htpasswd: {{realm: test, path: {tmp_path}/htpasswd}}}}\n") as address:
        trust(home, address)
        name = f"{address}/x"
        digest = push(address, "x", creds="user:secret", path=tmp_path / "a.tar")
        with pytest.raises(ImageError, match="does not exist, or needs a login") as caught:
            resolve.ensure(name, layout=layout)
        assert caught.value.hint == f"skopeo login {address}"
        process.run(["skopeo", "login", "-u", "user", "--password-stdin", "--tls-verify=false", address],
                    input=b"secret", env={"REGISTRY_AUTH_FILE": str(credentials)})  # fmt: skip
        if file == "auth.json":
            monkeypatch.setenv("REGISTRY_AUTH_FILE", str(credentials))
        assert resolve.ensure(name, layout=layout).digest == digest
        wrong = base64.b64encode(b"user:wrong").decode()
        credentials.write_text(json.dumps({"auths": {address: {"auth": wrong}}}))
        with pytest.raises(ImageError, match="needs a login"):
            resolve.ensure(name, pull="always", layout=layout)


def put_list(registry: str, name: str, entries: dict[str, str]) -> str:
    """Make ``name`` a list of manifests: digest by architecture."""
    manifests = []
    for architecture, digest in entries.items():
        url = f"http://{registry}/v2/{name.partition(':')[0]}/manifests/{digest}"
        kind = "application/vnd.docker.distribution.manifest.v2+json"
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": kind})) as response:
            size = len(response.read())
        platform = {"os": "linux", "architecture": architecture}
        manifests.append({"mediaType": kind, "digest": digest, "size": size, "platform": platform})
    raw = json.dumps({"schemaVersion": 2, "mediaType": LIST, "manifests": manifests}).encode()
    repository, _, tag = name.partition(":")
    request = urllib.request.Request(
        f"http://{registry}/v2/{repository}/manifests/{tag}", data=raw, method="PUT", headers={"Content-Type": LIST}
    )
    urllib.request.urlopen(request).close()
    return "sha256:" + hashlib.sha256(raw).hexdigest()


def test_a_list_of_architectures(registry: str, pushed: Callable[..., str], layout: Layout) -> None:
    ours = pushed("multi:ours", lower(), version(1))
    theirs = pushed("multi:theirs", lower(), version(2), architecture="s390x")
    whole = put_list(registry, "multi:1", {"s390x": theirs, skopeo.architecture(): ours})
    assert resolve.ensure(f"{registry}/multi:1", layout=layout).digest == ours
    assert resolve.ensure(f"{registry}/multi@{whole}", layout=layout).digest == ours
    put_list(registry, "multi:2", {"s390x": theirs})
    for name in ("multi:2", "multi:theirs"):
        with pytest.raises(ImageError, match="is for linux/s390x, and this host runs"):
            resolve.ensure(f"{registry}/{name}", layout=layout)


def test_short_names_go_through_the_registries_to_search(
    registry: str, pushed: Callable[..., str], home: Path, layout: Layout
) -> None:
    digest = pushed("fcvm-test-short:1")
    aliased = pushed("other/place", lower(), version(3))
    trust(home, registry, f'unqualified-search-registries = ["127.0.0.1:1", "{registry}"]')
    drop_in = home / ".config/containers/registries.conf.d/a.conf"
    drop_in.parent.mkdir()
    drop_in.write_text(f'[aliases]\n"fcvm-test-alias" = "{registry}/other/place"\n')
    made = resolve.ensure("fcvm-test-short:1", layout=layout)
    assert (made.digest, made.reference) == (digest, f"{registry}/fcvm-test-short:1")
    assert resolve.ensure("fcvm-test-short:1", pull="never", layout=layout) == made
    assert resolve.ensure("fcvm-test-alias", layout=layout).digest == aliased
    with pytest.raises(ImageError, match=r"127\.0\.0\.1:1 cannot be reached"):
        resolve.ensure("fcvm-test-nowhere", layout=layout)


def test_a_loaded_short_name_comes_before_any_registry(registry: str, home: Path, tmp_path: Path, layout: Layout) -> None:
    from fcvm.images import load

    trust(home, registry, f'unqualified-search-registries = ["{registry}"]')
    [made] = load.load(str(image(tmp_path / "a.tar")), layout, name="fcvm-test-short")
    for pull in ("missing", "always", "newer"):
        assert resolve.ensure("fcvm-test-short", pull=pull, layout=layout).key == made.key


def test_a_mirror_is_used(registry: str, pushed: Callable[..., str], home: Path, layout: Layout) -> None:
    digest = pushed("mirrored:1")
    (home / ".config/containers/registries.conf").write_text(
        f'[[registry]]\nlocation = "registry.invalid"\n[[registry.mirror]]\nlocation = "{registry}"\ninsecure = true\n'
    )
    assert resolve.ensure("registry.invalid/mirrored:1", layout=layout).digest == digest


def test_a_blob_that_the_registry_has_lost(registry: str, pushed: Callable[..., str], tmp_path: Path, layout: Layout) -> None:
    pushed("x")
    blobs = sorted((tmp_path / "registry/data").rglob("data"), key=lambda path: path.stat().st_size)
    blobs[-1].write_bytes(b"short")
    with pytest.raises(ImageError, match=f"The registry {registry}"):
        resolve.ensure(f"{registry}/x", layout=layout)
    assert not list(layout.images.glob("*.img"))
    assert not list((layout.cache / "images").iterdir())


def test_progress_counts_to_the_size(registry: str, pushed: Callable[..., str], layout: Layout) -> None:
    class Shown:
        seen: dict[str, list[tuple[int, int | None]]] = {}  # noqa: RUF012

        @contextmanager
        def step(self, title: str) -> Iterator["Shown"]:
            self.current = self.seen.setdefault(title, [])
            yield self

        def update(self, done: int, total: int | None = None) -> None:
            self.current.append((done, total))

        def note(self, text: str) -> None:
            assert text

    pushed("x", archive.layer([archive.File("big", os.urandom(2 << 20))]))
    shown = Shown()
    made: Image = resolve.ensure(f"{registry}/x", layout=layout, progress=shown)
    fetching, converting = (shown.seen[f"{verb} {made.reference}"] for verb in ("Fetching", "Converting"))
    size = converting[-1][1]
    assert size is not None
    assert size > 2 << 20
    assert converting[-1] == (size, size)
    assert fetching[-1][1] == size
    assert fetching[-1][0] >= size
