"""Podman itself on our disks: it lists, runs, saves and commits an image from the read-only store."""

import hashlib
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from images_support import archive

from fcvm import process
from fcvm.images import resolve, skopeo
from fcvm.images.store import Image
from fcvm.storage.layout import Layout

SCRIPT = """
mkdir -p "$AT/graph"
mount -t tmpfs none /run  # Podman wants a short path for its run-time state; this leaves nothing there
mkdir /run/images  # and the store's path is short in the guest, too: it is in the mount options once for each layer
mount -t cgroup2 none /sys/fs/cgroup  # crun refuses to look at another kind, even if it shall not use it
mount -t erofs -o ro,loop "$DISK" /run/images || exit 9
podman() {
    command podman --root "$AT/graph" --runroot /run/podman --storage-driver overlay --cgroup-manager cgroupfs \\
        --storage-opt additionalimagestore=/run/images --events-backend file "$@"
}
# Nothing that needs systemd, or limits above those of whoever runs the tests.
run() { podman run --network none --cgroups disabled --log-driver none \\
    --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 --no-healthcheck "$@"; }
"""


@pytest.fixture
def podman(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Image, str], str]:
    """Runs a script with ``podman`` and ``run`` for a store, in mounts of its own; returns what it prints."""
    process.find("podman")
    monkeypatch.setenv("HOME", str(tmp_path))

    def call(image: Image, script: str) -> str:
        environment = {**os.environ, "DISK": str(image.path), "AT": str(tmp_path / "at"), "ID": image.id[7:]}
        command = ["unshare", "--mount", "sh", "-ec", SCRIPT + script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def applets(*names: str) -> list[archive.File]:
    import packages

    return [
        archive.directory("bin"),
        archive.File("bin/busybox", packages.busybox().read_bytes(), 0o755),
        *(archive.symlink(f"bin/{name}", "busybox") for name in names),
        *(archive.directory(name) for name in ("proc", "sys", "dev", "etc", "run")),
    ]


def make(tmp_path: Path, *layers: bytes) -> Image:
    config = {"Env": ["PATH=/bin"], "Cmd": ["echo", "the image's own command"], "Healthcheck": {"Test": ["CMD", "true"]}}
    archive.write(tmp_path / "a.tar", list(layers), config, names=["localhost/a:1"], architecture=skopeo.architecture())
    return resolve.ensure(f"docker-archive:{tmp_path}/a.tar", layout=Layout(tmp_path / "base"))


def test_podman_runs_it(tmp_path: Path, podman: Callable[[Image, str], str]) -> None:
    below = archive.layer(
        [*applets("sh", "ls", "cat", "echo"), archive.directory("d"), archive.File("d/gone"), archive.File("d/kept", b"1")]
    )
    above = archive.layer([archive.File("d/.wh.gone"), archive.File("d/new", b"2"), archive.directory("tmp", 0o1777)])
    made = make(tmp_path, below, above)
    assert podman(made, "podman images -q --no-trunc").strip() == made.id
    assert podman(made, "run --rm $ID").strip() == "the image's own command"
    assert podman(made, "run --rm $ID sh -c 'ls /d; echo x >/d/kept; cat /d/kept'").split() == ["kept", "new", "x"]
    [inspected] = json.loads(podman(made, "podman image inspect $ID"))
    assert inspected["Digest"] == made.digest
    assert inspected["Healthcheck"]["Test"] == ["CMD", "true"]
    layers = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in (below, above)]
    assert inspected["RootFS"]["Layers"] == layers


def test_podman_runs_an_image_of_127_layers(tmp_path: Path, podman: Callable[[Image, str], str]) -> None:
    layers = [archive.layer(applets("sh", "ls")), *(archive.layer([archive.File(f"n/{n}")]) for n in range(126))]
    made = make(tmp_path, *layers)
    assert len(podman(made, "run --rm $ID ls /n").split()) == 126


def test_podman_saves_the_layers_as_they_came(tmp_path: Path, podman: Callable[[Image, str], str]) -> None:
    layers = [archive.layer(applets("sh")), archive.layer([archive.File("big", os.urandom(3_000_001)), archive.File(".wh.sys")])]
    made = make(tmp_path, *layers)
    podman(made, "podman save -q -o $AT/saved.tar $ID")
    with tarfile.open(tmp_path / "at/saved.tar") as tar:
        contents = [tar.extractfile(m).read() for m in tar if m.isreg()]  # type: ignore[union-attr]
    assert all(layer in contents for layer in layers)


def test_podman_commits_on_top_of_it(tmp_path: Path, podman: Callable[[Image, str], str]) -> None:
    made = make(tmp_path, archive.layer(applets("sh", "cat", "echo")))
    script = """
run --name c $ID sh -c 'echo changed >/file'
podman commit -q c localhost/new >/dev/null
podman rm c >/dev/null
run --rm localhost/new cat /file
podman save -q -o $AT/new.tar localhost/new
"""
    assert podman(made, script).strip() == "changed"
    assert (tmp_path / "at/new.tar").stat().st_size > made.size_bytes / 2
