"""The data directory's layout: what it is made of, and removing from it."""

import threading
from pathlib import Path

import pytest

from fcvm.errors import HostError
from fcvm.storage.layout import Layout, remove


def test_a_data_directory_that_cannot_be_made_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match=f"{tmp_path}/file cannot be used: .*Not a directory") as raised:
        Layout(tmp_path / "file").place("state")
    assert "FCVM_BASE_DIR" in str(raised.value.hint)


def test_several_may_remove_the_same_directory(tmp_path: Path) -> None:
    errors: list[OSError] = []

    def remove_it() -> None:
        try:
            remove(tmp_path / "vm")
        except OSError as error:
            errors.append(error)

    for _ in range(20):
        for number in range(100):
            (tmp_path / f"vm/{number}").mkdir(parents=True)
        threads = [threading.Thread(target=remove_it) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not (tmp_path / "vm").exists()
    assert errors == []
