"""Everything about images as an ordinary user, one that was made for the test."""

import json
import os
import pwd
from pathlib import Path

import pytest
from images_support import image
from user_support import PYTHON, Run

from fcvm.images import resolve
from fcvm.storage.layout import Layout

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="makes a user"),
    pytest.mark.skipif(not os.path.exists(PYTHON), reason="needs the system's Python"),
]

def fcvm(as_user: Run, *words: str) -> str:
    done = as_user(PYTHON, "-m", "fcvm", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_disk_is_the_one_that_root_makes(user: pwd.struct_passwd, as_user: Run, tmp_path: Path) -> None:
    """Owners, devices, whiteouts and attributes need no privilege, as they are only written into a file."""
    home = Path(user.pw_dir)
    image(home / "a.tar", "localhost/a:1")
    for reference in ("docker-archive:a.tar", "oci-archive:a.tar"):
        fcvm(as_user, "images", "pull", reference)
        made = resolve.ensure(reference.replace(":", f":{home}/"), layout=Layout(tmp_path / "base"))
        theirs = home / ".local/share/fcvm/images" / made.path.name
        assert theirs.stat().st_uid == user.pw_uid
        assert theirs.read_bytes() == made.path.read_bytes()


def test_load_list_and_remove(user: pwd.struct_passwd, as_user: Run) -> None:
    image(Path(user.pw_dir, "a.tar"), "localhost/a:1")
    assert fcvm(as_user, "images", "load", "a.tar") == "localhost/a:1\n"
    assert [entry["names"] for entry in json.loads(fcvm(as_user, "images", "ls", "--json"))] == [["localhost/a:1"]]
    assert fcvm(as_user, "images", "rm", "a:1") == "removed localhost/a:1\n"


def test_localhost_names_of_the_users_own_podman(user: pwd.struct_passwd, as_user: Run) -> None:
    image(Path(user.pw_dir, "a.tar"))
    copied = as_user("skopeo", "--insecure-policy", "copy", "docker-archive:a.tar", "containers-storage:localhost/mine:latest")
    assert copied.returncode == 0, copied.stderr
    id = fcvm(as_user, "images", "pull", "localhost/mine").strip()
    [entry] = json.loads(fcvm(as_user, "images", "ls", "--json"))
    assert (entry["names"], entry["id"]) == (["localhost/mine:latest"], f"sha256:{id}")
    assert user.pw_name not in Path("/proc/self/mounts").read_text()


def test_a_data_directory_of_somebody_else(user: pwd.struct_passwd, as_user: Run, tmp_path: Path) -> None:
    image(Path(user.pw_dir, "a.tar"), "localhost/a:1")
    tmp_path.chmod(0o755)
    done = as_user(PYTHON, "-m", "fcvm", "--base-dir", str(tmp_path), "images", "load", "a.tar")
    assert done.returncode == 125
    assert "Traceback" not in done.stderr
    assert "ermission denied" in done.stderr
