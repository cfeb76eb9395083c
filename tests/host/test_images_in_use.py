"""`fcvm images prune` and `rm` leave alone what snapshots and VMs need."""

import json
import os
import subprocess
import sys
from pathlib import Path

from images_support import image

from fcvm.images import resolve
from fcvm.snapshots.manifest import Hardware, Manifest, this_host
from fcvm.storage.layout import Layout

SOURCE = Path(__file__).parent.parent.parent / "src"


def fcvm(layout: Layout, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "FCVM_BASE_DIR": str(layout.base), "FCVM_MACHINE": "never",
                   "FCVM_CONFIG": "/dev/null"}  # fmt: skip
    command = [sys.executable, "-m", "fcvm", "images", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_the_image_of_a_snapshot_stays(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "base")
    made = resolve.ensure(f"docker-archive:{image(tmp_path / 'a.tar')}", layout=layout)
    snapshot = layout.snapshots / "tag"
    snapshot.mkdir()
    manifest = Manifest(
        hardware=Hardware(cpu=1, memory=128, boot_args="", tap=None, mac=None),
        disks={"image.img": f"images/{made.path.name}"},
        firecracker="1.12.1",
        host=this_host(),
        created_at=0.0,
    )
    manifest.write(snapshot)
    done = fcvm(layout, "prune", "--all", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, []), done.stderr
    refused = fcvm(layout, "rm", made.id[7:19])
    assert refused.returncode == 125
    assert "is used by a VM or a snapshot" in refused.stderr
    assert made.path.exists()
    (snapshot / "config.json").unlink()
    snapshot.rmdir()
    assert [entry["id"] for entry in json.loads(fcvm(layout, "prune", "--all", "--json").stdout)] == [made.id]
    assert not made.path.exists()
