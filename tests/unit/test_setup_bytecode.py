"""Bytecode for another Python than ours: here the guest's interpreter is this host's, behind the same command line."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fcvm.agent.pack import pack
from fcvm.errors import ProcessError
from fcvm.setup import bytecode

# What stands for the image's loader: called as `ld.so --library-path DIR DIR/python3 WORDS`, with a PYTHONHOME for another one.
LOADER = f'#!/bin/sh\nshift 3\nunset PYTHONHOME\nexec {sys.executable} "$@"\n'


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    directory = tmp_path / "tools"
    directory.mkdir()
    (directory / "ld.so").write_text(LOADER)
    (directory / "ld.so").chmod(0o755)
    return directory


def make(path: Path, **modules: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, source in modules.items():
            archive.writestr(f"{name}.py", source)
    return path


def run(archive: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-ISE", *options, archive], capture_output=True, text=True, check=False)


def test_modules_run_from_their_bytecode(tmp_path: Path, tools: Path) -> None:
    archive = make(
        tmp_path / "a.pyz", __main__="import helper; print(helper.__file__, helper.ANSWER)", helper="ANSWER = 42\n"
    )
    bytecode.precompile(archive, str(archive), tools, tmp_path)
    assert run(archive).stdout.split() == [f"{archive}/helper.pyc", "42"]
    with zipfile.ZipFile(archive) as packed:
        assert packed.namelist() == ["__main__.py", "__main__.pyc", "helper.py", "helper.pyc"]
        assert packed.read("helper.pyc").startswith(importlib.util.MAGIC_NUMBER)


def test_a_traceback_names_the_source(tmp_path: Path, tools: Path) -> None:
    archive = make(tmp_path / "a.pyz", __main__="import helper", helper="value = 1\nraise ValueError('so it is')\n")
    bytecode.precompile(archive, str(archive), tools, tmp_path)
    done = run(archive)
    assert "ValueError: so it is" in done.stderr
    assert f'{archive}/helper.py", line 2' in done.stderr


def test_the_same_sources_give_the_same_bytes(tmp_path: Path, tools: Path) -> None:
    archives = []
    for name in ("one", "two"):
        archive = tmp_path / f"{name}.pyz"
        pack(archive)
        bytecode.precompile(archive, "/run/agent.pyz", tools, tmp_path)
        archives.append(archive.read_bytes())
    assert archives[0] == archives[1]


def test_a_source_that_is_wrong_is_an_error(tmp_path: Path, tools: Path) -> None:
    archive = make(tmp_path / "a.pyz", __main__="def (")
    with pytest.raises(ProcessError, match="SyntaxError"):
        bytecode.precompile(archive, str(archive), tools, tmp_path)


def test_bytecode_of_another_python_is_passed_over(tmp_path: Path, tools: Path) -> None:
    """What happens if the guest's Python were updated inside a VM: slower, but not wrong."""
    archive = make(tmp_path / "a.pyz", __main__="import helper; print(helper.__file__)", helper="")
    bytecode.precompile(archive, str(archive), tools, tmp_path)
    other = tmp_path / "b.pyz"
    with zipfile.ZipFile(archive) as packed, zipfile.ZipFile(other, "w") as changed:
        for name in packed.namelist():
            data = packed.read(name)
            changed.writestr(name, b"\0\0\r\n" + data[4:] if name.endswith(".pyc") else data)
    assert run(other).stdout.strip() == f"{other}/helper.py"
