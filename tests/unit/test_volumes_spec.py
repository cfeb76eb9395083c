"""--map on the command line."""

import json
import os
import socket
from pathlib import Path

import pytest

from fcvm.errors import NotFoundError, UsageError, VolumeError
from fcvm.vm.spec import ImageUse, RunSpec
from fcvm.volumes.spec import MOST, Volume, owner, parse_all


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that the host paths of the tests are relative to."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "a b", "a,b", "a:b", "back\\slash", "a,b:ro"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "a" / "sub").mkdir()
    (tmp_path / "a" / "file").touch()
    (tmp_path / "a" / "link").symlink_to("anywhere")
    return tmp_path


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], []),
        (["a:/a"], [("a", "/a", False)]),
        (["a:/a:ro"], [("a", "/a", True)]),
        (["a:/a:rw"], [("a", "/a", False)]),
        (["a:/a", "b:/b"], [("a", "/a", False), ("b", "/b", False)]),
        (["a:/a,b:/b:ro"], [("a", "/a", False), ("b", "/b", True)]),
        (["a:/a:ro,b:/b"], [("a", "/a", True), ("b", "/b", False)]),
        (["a:/a:ro,Z,b:/b:z"], [("a", "/a", True), ("b", "/b", False)]),
        (["a b:/with space"], [("a b", "/with space", False)]),
        ([r"a\,b:/x\,y:ro"], [("a,b", "/x,y", True)]),
        ([r"a\:b:/x\:y"], [("a:b", "/x:y", False)]),
        ([r"a\,b\:ro:/x"], [("a,b:ro", "/x", False)]),
        ([r"back\slash:/x\\y"], [("back\\slash", "/x\\y", False)]),
        (["a:/data,b:/data/nested"], [("a", "/data", False), ("b", "/data/nested", False)]),
        (["a:/a:ro,b:/a/sub"], [("a", "/a", True), ("b", "/a/sub", False)]),
        (["a:/a:ro,b:/a/link"], [("a", "/a", True), ("b", "/a/link", False)]),
        (["a:/a,b:/a/x,b:/a/x/y"], [("a", "/a", False), ("b", "/a/x", False), ("b", "/a/x/y", False)]),
        (["./a/../b/:/x//y/"], [("b", "/x/y", False)]),
        ([".:/here"], [(".", "/here", False)]),
    ],
)
def test_map(texts: list[str], expected: list[tuple[str, str, bool]], place: Path) -> None:
    assert parse_all(texts) == [
        Volume(os.path.normpath(place / host), guest, read_only) for host, guest, read_only in expected
    ]


def test_a_file_and_a_symbolic_link(place: Path) -> None:
    (place / "link").symlink_to("a")
    assert parse_all(["file:/f", "link:/l"]) == [
        Volume(str(place / "file"), "/f", file=True),
        Volume(str(place / "a"), "/l"),
    ]


@pytest.mark.parametrize("text", ["", "a", "a:", ":/a", "a:/a:", "a:/a:ro:x", "a,b:/x", "a:/a,", "a:/a,,b:/b"])
def test_malformed_maps_say_how_it_is_written(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not HOST:GUEST|no option") as raised:
        parse_all([text])
    assert "HOST:GUEST[:ro]" in (raised.value.hint or "")


@pytest.mark.parametrize(
    ("texts", "error", "words"),
    [
        (["a:a"], UsageError, "'a' is not absolute"),
        (["a:/"], UsageError, "root"),
        (["a:/x/.."], UsageError, "root"),
        (["a:/a:readonly"], UsageError, "'readonly'"),
        (["a:/x", "b:/y/../x"], UsageError, "/x"),
        (["missing:/x"], NotFoundError, "missing cannot be mapped: No such file"),
        (["a:/\udcff"], UsageError, "UTF-8"),
        (["a:/a:ro,rw"], UsageError, "contradict"),
        (["a:/a:ro,b:/a/not-there"], VolumeError, "/a, which is read-only and has no such directory"),
        (["b:/a/not-there,a:/a:ro"], VolumeError, "has no such directory"),
        (["a:/a:ro,b:/a/file"], VolumeError, "is to show a directory"),
        (["a:/a,file:/a/sub"], VolumeError, "is to show a file"),
        (["a:/a:ro,file:/a/new"], VolumeError, "has no such file"),
        (["file:/f,b:/f/x"], VolumeError, "which is a file"),
        ([f"a:/{n}" for n in range(MOST + 1)], UsageError, str(MOST)),
    ],
)
def test_what_cannot_be_mapped(texts: list[str], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        parse_all(texts)


def test_only_directories_and_files(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("socket")
        with pytest.raises(VolumeError, match="neither a directory nor a file"):
            parse_all(["socket:/s"])


def test_a_spec_with_volumes_survives_json() -> None:
    image = ImageUse(reference="i", id="sha256:0", digest="sha256:1", path="/i")
    spec = RunSpec(name="n", image=image, volumes=parse_all(["a:/a:ro", "file:/f"]))
    assert RunSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("user", "ids"),
    [
        ("", (0, 0)),
        ("0", (0, 0)),
        ("1000", (1000, 0)),
        ("1000:100", (1000, 100)),
        ("www-data", (0, 0)),
        ("1:g", (1, 0)),
        ("node:1000", (0, 1000)),
    ],
)
def test_owner(user: str, ids: tuple[int, int]) -> None:
    assert owner(user) == ids
