"""The store: names, ids, removal, pruning, and what is in use."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fcvm.errors import ConflictError, ImageError, NotFoundError, UsageError
from fcvm.images import adopt, docker, store, work
from fcvm.storage.layout import Layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "base")


def add(layout: Layout, digit: str, *names: str, content: bytes = b"disk") -> str:
    """An image whose id and digest are ``digit`` over and over."""
    digest = "sha256:" + digit * 64
    key = store.key(digest)
    scratch = layout.cache / digit
    scratch.write_bytes(content)
    store.put(layout, key, scratch, store.Metadata(digest, digest, "amd64", len(content), "", {"Cmd": ["sh"]}))
    for name in names:
        assert store.set_name(layout, name, key)
    return key


def listed(layout: Layout) -> dict[str, list[str]]:
    return {image.key: names for image, names in store.images(layout)}


def test_an_empty_store(layout: Layout) -> None:
    assert listed(layout) == {}
    assert store.prune(layout) == []
    with pytest.raises(NotFoundError):
        store.find(layout, "x")


def test_what_is_put_is_found(layout: Layout) -> None:
    key = add(layout, "a", "localhost/x:latest")
    image = store.get(layout, key, "localhost/x:latest")
    assert image is not None
    assert (image.id, image.config, image.size_bytes) == ("sha256:" + "a" * 64, {"Cmd": ["sh"]}, 4)
    assert image.path.read_bytes() == b"disk"


@pytest.mark.parametrize("text", ["x", "localhost/x", "x:latest", "aaaa", "a" * 12, "sha256:" + "a" * 64])
def test_names_that_find_it(layout: Layout, text: str) -> None:
    key = add(layout, "a", "localhost/x:latest")
    add(layout, "b", "docker.io/library/y:1")
    assert store.find(layout, text)[0].key == key


def test_a_docker_hub_name_is_found_by_its_short_form(layout: Layout) -> None:
    key = add(layout, "b", "docker.io/library/y:1")
    assert store.find(layout, "y:1")[0].key == key


def test_an_ambiguous_id(layout: Layout) -> None:
    for last in "12":
        digest = "sha256:" + "c" * 63 + last
        scratch = layout.cache / last
        scratch.write_bytes(b"")
        store.put(layout, store.key(digest), scratch, store.Metadata(digest, digest, "amd64", 0))
    with pytest.raises(UsageError, match="more than one"):
        store.find(layout, "cccc")
    assert store.find(layout, "c" * 63 + "1")[0].id.endswith("1")


def test_a_name_moves_and_leaves_the_old_image(layout: Layout) -> None:
    old, new = add(layout, "a", "localhost/x:latest"), add(layout, "b", "localhost/x:latest")
    assert listed(layout) == {new: ["localhost/x:latest"], old: []}
    assert [image.key for image in store.prune(layout)] == [old]
    assert listed(layout) == {new: ["localhost/x:latest"]}
    assert sorted(path.suffix for path in layout.images.glob("[!.]*")) == [".img", ".json", ".json"]


def test_no_name_for_an_image_that_is_not_here(layout: Layout) -> None:
    assert not store.set_name(layout, "localhost/x:latest", store.key("sha256:x"))
    assert store.names(layout) == {}


def test_rm_takes_the_name_and_with_the_last_the_image(layout: Layout) -> None:
    key = add(layout, "a", "localhost/x:latest", "localhost/y:latest")
    assert store.untag(layout, "x") == ("localhost/x:latest", False)
    assert listed(layout) == {key: ["localhost/y:latest"]}
    assert store.untag(layout, "localhost/y") == ("localhost/y:latest", True)
    assert listed(layout) == {}
    assert not store.disk_path(layout, key).exists()


def test_rm_by_id(layout: Layout) -> None:
    add(layout, "a", "localhost/x:latest", "localhost/y:latest")
    with pytest.raises(ConflictError, match="several names"):
        store.untag(layout, "aaaa")
    store.untag(layout, "x")
    assert store.untag(layout, "aaaa") == ("localhost/y:latest", True)
    add(layout, "b")
    assert store.untag(layout, "bbbb") == ("sha256:" + "b" * 64, True)


@pytest.mark.parametrize("link", [os.link, os.symlink])
@pytest.mark.parametrize("place", ["vms/1/image.img", "snapshots/tag/image.img"])
def test_an_image_in_use_stays(layout: Layout, link: "object", place: str) -> None:
    key = add(layout, "a", "localhost/x:latest")
    use = layout.base / place
    use.parent.mkdir(parents=True)
    link(store.disk_path(layout, key), use)  # type: ignore[operator]
    with pytest.raises(ConflictError, match="used"):
        store.untag(layout, "x")
    assert store.prune(layout, everything=True) == []
    use.unlink()
    assert [image.key for image in store.prune(layout, everything=True)] == [key]
    assert store.names(layout) == {}


def test_keys_in_use_may_be_named(layout: Layout) -> None:
    key = add(layout, "a")
    assert store.prune(layout, used=[key]) == []
    assert len(store.prune(layout)) == 1


def test_prune_leaves_named_images(layout: Layout) -> None:
    key = add(layout, "a", "localhost/x:latest")
    assert store.prune(layout) == []
    assert listed(layout) == {key: ["localhost/x:latest"]}


def test_prune_clears_metadata_and_names_without_a_disk(layout: Layout) -> None:
    key = add(layout, "a", "localhost/x:latest")
    store.disk_path(layout, key).unlink()
    assert listed(layout) == {}
    store.prune(layout)
    assert store.names(layout) == {}
    assert not list(layout.images.glob(f"{key}*"))


def test_damaged_names_are_told(layout: Layout) -> None:
    (layout.images / "names.json").write_text("{")
    with pytest.raises(ImageError, match=r"names\.json") as caught:
        store.names(layout)
    assert "rm " in (caught.value.hint or "")


def test_damaged_metadata_means_no_image(layout: Layout) -> None:
    key = add(layout, "a", "localhost/x:latest")
    store.disk_path(layout, key).with_suffix(".json").write_text("{}")
    assert store.get(layout, key) is None


def test_many_at_once_lose_no_name(layout: Layout) -> None:
    key = add(layout, "a")
    threads = [threading.Thread(target=store.set_name, args=(layout, f"localhost/{n}:latest", key)) for n in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.names(layout)) == 30


def test_adopting_an_image_of_another_store(layout: Layout, tmp_path: Path) -> None:
    host = Layout(tmp_path / "host")
    key = add(host, "a", "localhost/x:latest", content=b"x" * 100_000)
    source = store.disk_path(host, key)
    ours = adopt.adopt(source, layout)
    assert ours == store.disk_path(layout, key)
    assert ours.read_bytes() == source.read_bytes()
    assert store.get(layout, key) is not None
    inode = ours.stat().st_ino
    assert adopt.adopt(source, layout).stat().st_ino == inode
    assert adopt.adopt(ours, layout) == ours
    assert not list((layout.cache / "images").iterdir())


def test_adopting_what_is_not_there(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        adopt.adopt(tmp_path / "none.img", layout)


def test_scratch_directories_do_not_outlive_their_process(layout: Layout) -> None:
    with work.directory(layout) as mine:
        left = layout.cache / "images/left"
        left.mkdir()
        (left / "blob").write_bytes(b"x")
        with work.directory(layout) as other:
            assert not left.exists()
            assert mine.exists()
            assert other != mine
        work.sweep(layout)
        assert mine.exists()
    assert not mine.exists()


def test_the_docker_daemon_is_asked_for_an_id(tmp_path: Path) -> None:
    from http.server import BaseHTTPRequestHandler
    from socketserver import ThreadingUnixStreamServer

    class Daemon(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/images/localhost/x%3A1/json"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(b'{"Id": "sha256:abc"}')

        def address_string(self) -> str:
            return "unix"

        def log_message(self, *_: object) -> None:
            pass

    path = tmp_path / "docker.sock"
    env = {"DOCKER_HOST": f"unix://{path}"}
    assert docker.image_id("localhost/x:1", env) == ""
    with ThreadingUnixStreamServer(str(path), Daemon) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert docker.image_id("localhost/x:1", env) == "sha256:abc"
            assert docker.image_id("localhost/y", env) == ""
        finally:
            server.shutdown()
            thread.join()
    assert docker.image_id("x", {"DOCKER_HOST": "tcp://127.0.0.1:1"}) == ""


@pytest.mark.parametrize("remove", [lambda layout: store.prune(layout, everything=True), lambda layout: store.untag(layout, "localhost/x")])
def test_a_full_disk_is_freed(layout: Layout, monkeypatch: pytest.MonkeyPatch, remove: Callable[[Layout], object]) -> None:
    """The names are written only when the image has made the space for them."""
    key = add(layout, "a", "localhost/x:latest")
    write = store.write_atomically

    def write_if_there_is_space(path: Path, text: str) -> None:
        if store.disk_path(layout, key).exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(store, "write_atomically", write_if_there_is_space)
    remove(layout)
    assert (listed(layout), store.names(layout)) == ({}, {})
    assert store.prune(layout) == []


def test_vms_that_end_while_their_disks_are_looked_at(layout: Layout) -> None:
    """Found as `fcvm images prune` that failed beside a VM that ended."""
    key = add(layout, "a", "localhost/x:latest")
    (layout.vms / "lives").mkdir(parents=True)
    (layout.vms / "lives/image.img").symlink_to(store.disk_path(layout, key))
    (layout.vms / "file").touch()
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            directory = layout.vms / "ends"
            directory.mkdir()
            (directory / "image.img").symlink_to("/other.img")
            (directory / "image.img").unlink()
            directory.rmdir()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        assert all(key in store.in_use(layout) for _ in range(2000))
    finally:
        ended.set()
        thread.join()


def test_scratch_directories_that_go_while_they_are_swept(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two `fcvm images pull` at once: the one that ends removes its directory while the other looks at it."""
    with work.directory(layout) as path:
        monkeypatch.setattr(Path, "glob", lambda *_: [path.with_name("gone"), path])
        work.sweep(layout)
        assert path.exists()


def test_a_list_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "names.json", []
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((Path(f"/proc/self/fd/{fd}").read_text(), path.read_text())))
    store.write_atomically(path, "new")
    assert synced == [("new", "old")]
    assert path.read_text() == "new"
