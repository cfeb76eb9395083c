"""VMs of an ordinary user, in a machine of their own."""

import json
import os
import pwd
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from user_support import PYTHON, Run
from vm.conftest import ROOT, TIMEOUT, environment

from fcvm import config, host

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="makes a user"),
    pytest.mark.skipif(not os.path.exists(PYTHON), reason="needs the system's Python"),
    pytest.mark.skipif(not host.uses_machine(config.load()), reason="an ordinary user need not have access to KVM"),
]
SETTINGS = {"FCVM_MACHINE_MEM": "2g"}


@pytest.fixture
def image(user: pwd.struct_passwd) -> Iterator[str]:
    """The demo image as a file of the user's."""
    path = Path(user.pw_dir, "demo.tar")
    subprocess.run([sys.executable, str(ROOT / "examples/build"), "demo", "--output", str(path)], check=True, env=environment())
    path.chmod(0o644)
    return f"docker-archive:{path.name}"


def test_an_ordinary_users_vms_are_that_users(user: pwd.struct_passwd, as_user: Run, image: str) -> None:
    home = Path(user.pw_dir)

    def fcvm(*words: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
        done = as_user(PYTHON, "-m", "fcvm", *words, env=SETTINGS, timeout=TIMEOUT)
        assert done.returncode == code, (words, done.returncode, done.stdout, done.stderr)
        return done

    def run(*words: str) -> str:
        return fcvm(*words).stdout

    try:
        run("setup")  # what root has set up is shared
        (home / "site").mkdir()
        (home / "site/index.html").write_text("of mine\n")
        os.chown(home / "site", user.pw_uid, user.pw_gid)
        options = ["--name", "mine", "--publish", "127.0.0.1::80", "--map", "site:/site"]
        run("podman", "run", "-d", *options, image, "--", "httpd", "-f", "-h", "/site")
        assert run("exec", "mine", "--", "sh", "-c", "id -u; touch /site/made; stat -c %u /site/made").split() == ["0", "0"]
        made = (home / "site/made").stat()
        assert (made.st_uid, made.st_gid) == (user.pw_uid, user.pw_gid)
        (listed,) = json.loads(run("ls", "--json"))
        assert listed["network"]["mode"] == "rootless"
        port = listed["network"]["ports"][0]["host_port"]
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=TIMEOUT).read() == b"of mine\n"
        run("snapshot", "create", "mine", "--tag", "mine")
        assert run("snapshot", "run", "--snapshot", "mine", "--exec", "cat /etc/hostname") != "mine\n"
        assert run("stop", "-t", "0", "mine") == "mine\n"
        fcvm("podman", "run", image, "--", "sh", "-c", "exit 7", code=7)
        refused = fcvm("podman", "run", "--network", "bridged", image, "--", "true", code=125)
        assert "needs root" in refused.stderr
    finally:
        as_user(PYTHON, "-m", "fcvm", "machine", "rm", "--force", env=SETTINGS, timeout=TIMEOUT)
    # Whose parent is an init that does not look after them stay as zombies.
    left = subprocess.run(["pgrep", "-u", str(user.pw_uid), "-r", "DIRST", "-a"], capture_output=True, text=True, check=False)
    assert left.stdout == ""
