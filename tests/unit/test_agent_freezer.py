"""fc_agent.freezer on a directory in the place of the kernel's control groups."""

import threading
from pathlib import Path

import pytest

from fc_agent import freezer


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("init", "libpod_parent", "sessions"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.freeze").write_text("0")
        (tmp_path / name / "cgroup.events").write_text("populated 1\nfrozen 1\n")
    (tmp_path / "ours").write_text("0::/init\n")
    monkeypatch.setattr(freezer, "ROOT", str(tmp_path))
    monkeypatch.setattr(freezer, "OURS", str(tmp_path / "ours"))
    monkeypatch.setattr(freezer, "_expected", set())
    return tmp_path


def state(groups: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in groups.glob("*/cgroup.freeze")}


def test_everything_but_ourselves_is_frozen_and_thawed(groups: Path) -> None:
    assert freezer.freeze()
    assert state(groups) == {"init": "0", "libpod_parent": "1", "sessions": "1"}
    freezer.thaw()
    assert set(state(groups).values()) == {"0"}
    freezer.thaw()


def test_nothing_is_started_meanwhile(groups: Path) -> None:
    started = threading.Event()

    def start() -> None:
        with freezer.starting():
            started.set()

    assert freezer.freeze()
    thread = threading.Thread(target=start)
    thread.start()
    assert not started.wait(0.2)
    freezer.thaw()
    assert started.wait(30)
    thread.join()


def test_what_is_being_started_is_waited_for(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []

    def begun() -> bool:
        looks.append(state(groups)["libpod_parent"])
        return len(looks) > 3

    with freezer.starting():
        freezer.expect(begun)
    assert freezer.freeze()
    assert set(looks) == {"0"}, "nothing was frozen before it had begun"
    freezer.thaw()


def test_what_does_not_stand_still_is_told(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freezer, "LIMIT", 0.05)
    (groups / "libpod_parent/cgroup.events").write_text("populated 1\nfrozen 0\n")
    assert not freezer.freeze()
    freezer.thaw()
    assert set(state(groups).values()) == {"0"}


def test_a_system_that_is_not_ours_is_left_alone(groups: Path) -> None:
    (groups / "ours").write_text("0::/\n")
    assert freezer.freeze()
    assert set(state(groups).values()) == {"0"}
    freezer.thaw()
