"""What a mapped directory costs in a guest: the cases of bench/files.py there and on the guest's own ext4, in turn.

    python -m bench.volumes_guest [--quick] [--json FILE]

Runs where the VMs are; `python -m bench` starts it there. In an emulated guest files are small, and few. Target: what is
cached is read as fast as from ext4. For 9p and virtio-fs, which Firecracker has not, there is bench/volumes_qemu.py.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from bench import files
from bench.common import image
from bench.guests import ask, call, run
from fcvm import config, host
from fcvm.storage.layout import Layout
from fcvm.vm import state
from fcvm.vm.spec import RunSpec
from fcvm.volumes.spec import Volume

VOLUMES = "/run/fcvm/volumes"  # in the guest OS
DIRECTORIES = {"ext4": "/scratch", "map": f"{VOLUMES}/0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small files and one round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rates and ratios here")
    args = parser.parse_args()
    sizes = "emulated" if host.emulated() else "quick" if args.quick else "full"
    layout = Layout(config.load().base_dir)
    name = f"bench-{os.getpid()}"
    with tempfile.TemporaryDirectory(dir=layout.cache) as volume:
        run(
            RunSpec(
                name=name,
                image=image(layout, "demo")[1],
                command=["sleep", "1000000"],
                memory=3072 if sizes == "full" else 1024,
                volumes=[Volume(volume, "/volume"), Volume(str(Path(files.__file__).parent), "/bench", read_only=True)],
                detach=True,
            )
        )
        try:
            words = [f"{target}={directory}" for target, directory in DIRECTORIES.items()]
            words += ["--sizes", sizes, "--rounds", "1" if args.quick else "3"]
            program = ["python3", f"{VOLUMES}/1/files.py", *words]
            results = json.loads(ask(layout.vms / state.find(layout, name=name).id, program, target="vm"))
        finally:
            call("stop", "-t", "0", name)
    files.show(files.CASES, results, "map")
    if args.json:
        args.json.write_text(json.dumps(files.report(files.CASES, results, "map"), indent=1) + "\n")


if __name__ == "__main__":
    main()
