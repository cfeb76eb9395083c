"""Bringing fcvm's code and assets into the machine: the real receiver, run here."""

import json
import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from fcvm.machine import receive, sync
from fcvm.setup.assets import Assets


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "src"
    for package in sync.PACKAGES:
        (root / package / "sub").mkdir(parents=True)
        (root / package / "__init__.py").write_text(f"# {package}\n")
        (root / package / "sub/module.py").write_text("VALUE = 1\n")
        (root / package / "__pycache__").mkdir()
        (root / package / "__pycache__/x.pyc").write_bytes(b"junk")
    (root / "fcvm/data.sh").write_text("#!/bin/sh\n")
    monkeypatch.setattr(sync, "SOURCES", root)
    return root


def run_receiver(code: Path, files: list[list[str]], assets: Path, content: str = "{}") -> str:
    """Run the program as the machine does: its text, with the code on stdin."""
    work = {"code": str(code), "files": files, "assets": str(assets), "content": content}
    program = Path(receive.__file__).read_text()
    done = subprocess.run(
        [sys.executable, "-ISE", "-c", program, json.dumps(work)], input=sync.pack_code(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_key_follows_the_code(sources: Path) -> None:
    before = sync.code_key()
    assert sync.code_key() == before
    (sources / "fcvm/__pycache__/y.pyc").write_bytes(b"more")
    assert sync.code_key() == before
    (sources / "fuse_pipe/sub/module.py").write_text("VALUE = 2 \n")
    changed = sync.code_key()
    assert changed != before
    (sources / "fc_agent/new.py").touch()
    assert sync.code_key() not in (before, changed)


def test_code_arrives_whole(sources: Path, tmp_path: Path) -> None:
    code = tmp_path / "machine/code/abc"
    run_receiver(code, [], tmp_path / "machine/cache/assets.json", '{"a": 1}')
    found = {str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()}
    assert found == {name for name, _, _ in sync.code_files()}
    for name, size, modified in sync.code_files():
        assert (code / name).read_bytes() == (sources / name).read_bytes()
        status = (code / name).stat()
        assert (status.st_size, status.st_mtime_ns) == (size, modified)
    assert (tmp_path / "machine/cache/assets.json").read_text() == '{"a": 1}'
    assert [path.name for path in code.parent.iterdir()] == ["abc"]


def test_compiled_modules_are_kept_for_the_next_version(sources: Path, tmp_path: Path) -> None:
    codes = tmp_path / "machine/code"
    run_receiver(codes / "one", [], tmp_path / "assets")
    compiled = py_compile.compile(str(codes / "one/fcvm/sub/module.py"))
    assert compiled is not None
    (sources / "fcvm/__init__.py").write_text("# changed\n")
    run_receiver(codes / "two", [], tmp_path / "assets")
    name = Path(compiled).relative_to(codes / "one")
    assert os.path.samefile(codes / "one" / name, codes / "two" / name)
    # Python takes it: the time and size of the source are the same.
    script = "import importlib.util, sys; sys.path.insert(0, sys.argv[1]); import fcvm.sub.module as m; print(m.__cached__)"
    before = (codes / "two" / name).stat().st_ino
    subprocess.run([sys.executable, "-IS", "-c", script, str(codes / "two")], check=True, capture_output=True)
    assert (codes / "two" / name).stat().st_ino == before


def test_the_same_version_again_changes_nothing(sources: Path, tmp_path: Path) -> None:
    codes = tmp_path / "machine/code"
    run_receiver(codes / "one", [], tmp_path / "assets")
    before = (codes / "one").stat().st_ino
    run_receiver(codes / "one", [], tmp_path / "assets")
    assert (codes / "one").stat().st_ino == before
    assert [path.name for path in codes.iterdir()] == ["one"]


def test_assets_are_copied_once(sources: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "root.img", tmp_path / "machine/guest/key/root.img"
    source.write_bytes(os.urandom(9 << 20))
    source.chmod(0o755)
    said = run_receiver(tmp_path / "code/x", [[str(source), str(target)]], tmp_path / "assets")
    assert "root.img 9 of 9 MiB" in said
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in target.parent.iterdir()] == ["root.img"]
    source.unlink()
    assert run_receiver(tmp_path / "code/x", [[str(source), str(target)]], tmp_path / "assets") == ""


def test_half_of_the_code_is_not_taken_for_all_of_it(sources: Path, tmp_path: Path) -> None:
    """The command that sends it was killed."""
    work = {"code": str(tmp_path / "code/x"), "files": [], "assets": str(tmp_path / "assets"), "content": "{}"}
    program = Path(receive.__file__).read_text()
    done = subprocess.run(
        [sys.executable, "-ISE", "-c", program, json.dumps(work)], input=sync.pack_code()[:-5], capture_output=True, check=False
    )
    assert done.returncode != 0
    assert b"Traceback" not in done.stderr
    assert not (tmp_path / "code/x").exists()
    run_receiver(tmp_path / "code/x", [], tmp_path / "assets")
    assert [path.name for path in (tmp_path / "code").iterdir()] == ["x"]


def test_who_copies_at_the_same_time_does_not_write_to_our_file(tmp_path: Path) -> None:
    """The command that asked for it was killed, and what it started here has not heard of that yet."""
    target = tmp_path / "machine/root.img"
    os.mkfifo(tmp_path / "slow")
    program = Path(receive.__file__).read_text()
    script = f"{program.replace('if __name__', 'if 0 and __name__')}\ncopy_file(*sys.argv[1:])"
    other = subprocess.Popen([sys.executable, "-ISE", "-c", script, str(tmp_path / "slow"), str(target)], stderr=subprocess.PIPE)
    with open(tmp_path / "slow", "wb", buffering=0) as half:
        half.write(b"half of it")
        while not list(tmp_path.glob("machine/*")):
            pass
        (tmp_path / "whole").write_bytes(b"the whole file")
        receive.copy_file(str(tmp_path / "whole"), str(target))
        assert target.read_bytes() == b"the whole file"
    other.communicate()
    assert target.read_bytes() == b"the whole file"
    assert [path.name for path in target.parent.iterdir()] == ["root.img"]


def test_plan_names_assets_by_their_place_in_the_data_directory(sources: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    elsewhere = tmp_path / "usr/bin/firecracker"
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_bytes(b"ELF")
    for name in ("kernels/k/vmlinux", "initrd/i/initrd.img", "guest/g/root.img"):
        (base / name).parent.mkdir(parents=True)
        (base / name).touch()
    assets = Assets(
        vmlinux=base / "kernels/k/vmlinux",
        vmlinuz=base / "kernels/k/vmlinuz",
        kernel_version="6",
        root_image=base / "guest/g/root.img",
        initrd=base / "initrd/i/initrd.img",
        machine_initrd=base / "initrd/i/initrd.img",
        tools=base / "guest/g/tools",
        firecracker=elsewhere,
        firecracker_version="1.12.1",
    )
    plan = sync.plan(assets, base)
    there = Assets.from_json(plan.content)
    assert there.root_image == sync.BASE / "guest/g/root.img"
    assert there.firecracker.parent.parent == sync.BASE / "bin"
    assert dict(plan.files)[elsewhere] == there.firecracker
    assert elsewhere.with_name("jailer") not in dict(plan.files)
    elsewhere.with_name("jailer").touch()
    assert dict(sync.plan(assets, base).files)[elsewhere.with_name("jailer")] == there.firecracker.with_name("jailer")
    elsewhere.write_bytes(b"another")
    assert sync.plan(assets, base).key != plan.key
