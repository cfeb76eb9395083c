"""`fcvm podman run` of the demo image to its first output byte, in stages, beside its floor (bench/floor.py).

    python -m bench.run [--rounds N | --quick] [--json FILE]

Runs where the VMs are; `python -m bench` starts it there. Target: a cold run takes at most twice the floor.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench import common, floor
from fcvm import config, setup
from fcvm.storage.layout import Layout


def fcvm(spec: dict[str, object]) -> tuple[float, dict[str, float]]:
    """Run the demo image's `echo` once: seconds of the whole command, and the stages that --timings prints."""
    envelope = {"args": {"fcvm_command": "podman", "action": "run", "spec": spec}, "settings": {}}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "fcvm.cli.remote", json.dumps(envelope)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    total = time.monotonic() - started
    rows = [line.rsplit(None, 4) for line in done.stderr.splitlines() if line.endswith(" s")]
    return total, {row[0].strip(): float(row[3]) for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_const", dest="rounds", const=2, help="two rounds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from fcvm.vm.spec import RunSpec

    settings = config.load()
    layout = Layout(settings.base_dir)
    assets = setup.find(settings, layout)
    image, use = common.image(layout, "demo")
    results: dict[str, list[float]] = {"floor": [], "fcvm, cold": [], "fcvm, boot snapshot": []}
    stages: dict[str, float] = {}
    for number in range(args.rounds):
        directory = floor.fresh(layout.cache, "floor")
        try:
            results["floor"].append(floor.run(assets, layout, image.path, directory, cpu=2, memory=1024)["total"])
        finally:
            shutil.rmtree(directory)
        for title, snapshot in (("fcvm, cold", False), ("fcvm, boot snapshot", True)):
            spec = RunSpec(
                name=f"bench-{os.getpid()}-{number}", image=use, command=["echo", "hi"], timings=True, snapshot=snapshot
            )
            _, marks = fcvm(spec.to_json())
            results[title].append(marks["first output"])
            stages.update({f"{title}: {name}": at for name, at in marks.items()})
    least = statistics.median(results["floor"])
    print(f"{'to the first output byte':<28} {'median s':>9} {'of the floor':>13}")
    for title, values in results.items():
        print(f"{title:<28} {statistics.median(values):9.2f} {statistics.median(values) / least:13.2f}")
    print("\nstages of the last round, seconds since the start")
    for name, at in stages.items():
        print(f"{name:<44} {at:8.2f}")
    if args.json:
        args.json.write_text(json.dumps({"seconds": results, "stages": stages}, indent=1))


if __name__ == "__main__":
    main()
