"""The settings: where they come from, and what is wrong with them."""

import os
from pathlib import Path

import pytest

from fcvm import config
from fcvm.errors import UsageError


@pytest.mark.parametrize(
    ("text", "mib"),
    [("512", 512), ("512m", 512), ("2g", 2048), ("2G", 2048), ("2GiB", 2048), ("1.5gb", 1536), (" 4 m ", 4), ("2048k", 2), ("1t", 1 << 20)],
)
def test_sizes(text: str, mib: int) -> None:
    assert config.size(text) == mib


@pytest.mark.parametrize("text", ["0", "1k", "0.9m", "1023kib"])
def test_what_is_too_small_a_size(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}' is less than 1m"):
        config.size(text)


@pytest.mark.parametrize("text", ["", "-1", "lots", "abcg", "infg", "nang", "1e400g", "2gg", "ib", "g", "1_0", "٣g", "9" * 400, "512b", "512ib"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size like 512m or 2g"):
        config.size(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x", "cannot be read"),
        ("unknown = 1", "unknown settings: unknown"),
        ('mem = "infg"', "mem of .*: 'infg' is not a size"),
        ("mem = [1]", r"mem of .*: \[1\] is not one value"),
        ("[mem]", "mem of .* is not one value"),
        ("base_dir = ['x']", "base_dir of .* is not one value"),
        ('base_dir = "~nobody-of-this-name/x"', "names no directory"),
        ("cpu = 2.5", "cpu of .*: '2.5' is not a whole number from 1 on"),
        ("cpu = true", "cpu of .*: 'True' is not a whole number"),
        ("cpu = 0", "from 1 on"),
        ("machine_cpus = 0", "from 1 on"),
        ("stop_timeout = -1", "from 0 on"),
        ("nv2 = 3", "neither true nor false"),
        ('machine = "maybe"', "'maybe' is none of auto, always, never"),
        ('kernel_profile = "own"', "'own' is none of debian, kata"),
        ("log = 3", "'3' is none of debug, info, warning, error"),
    ],
)
def test_what_is_wrong_in_a_file_is_told(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(content)
    with pytest.raises(UsageError, match=message):
        config.load(env={"FCVM_CONFIG": str(tmp_path / "c.toml")})


def test_what_is_wrong_elsewhere_is_told(tmp_path: Path) -> None:
    env = {"FCVM_CONFIG": str(tmp_path / "none")}
    with pytest.raises(UsageError, match="cpu of the environment is wrong: 'two'"):
        config.load(env={**env, "FCVM_CPU": "two"})
    with pytest.raises(UsageError, match="log of the command line is wrong"):
        config.load({"log": "loud"}, env=env)


def test_an_empty_variable_is_not_set(tmp_path: Path) -> None:
    """``FCVM_BASE_DIR= fcvm ls`` would fill the current directory otherwise."""
    env = {"FCVM_CONFIG": str(tmp_path / "none")}
    empty = {f"FCVM_{setting.name.upper()}": "" for setting in config.SETTINGS}
    assert config.load(env=env | empty) == config.load(env=env)


def test_the_data_directory_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    env = {"FCVM_CONFIG": str(tmp_path / "none")}
    assert config.load(env={**env, "FCVM_BASE_DIR": "data"}).base_dir == str(tmp_path / "data")
    assert config.load(env={**env, "FCVM_BASE_DIR": "~/data"}).base_dir == str(tmp_path / "home/data")
    assert config.load(env={**env, "FCVM_FURTHER_IMAGES": "~/other"}).further_images == str(tmp_path / "home/other")
    assert config.load(env=env).further_images == ""


def test_a_user_without_a_home_is_asked_for_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and an entry in /etc/passwd
    with pytest.raises(UsageError, match=r"base_dir of the defaults is wrong: .* names no directory"):
        config.load(env={"FCVM_CONFIG": str(tmp_path / "none")})


def test_the_generated_file_is_the_defaults(tmp_path: Path) -> None:
    lines = [line.removeprefix("# ") if " = " in line else line for line in config.generate().splitlines()]
    (tmp_path / "c.toml").write_text("\n".join(lines))
    env = {"FCVM_CONFIG": str(tmp_path / "none")}
    assert config.load(env={"FCVM_CONFIG": str(tmp_path / "c.toml")}) == config.load(env=env)
