"""All measurements, or those named: ``python -m bench [start run clones guests network ...]``.

Each is a module of its own that prints a table, with its floor measured in the same run. Those in ``WHERE_VMS_ARE`` run
in the machine where there is no KVM. What those in ``REPORTED`` find is kept in ``build/bench/``, and bench/report.py makes
docs/performance.md and its plots of it.
"""

import subprocess
import sys
from pathlib import Path

from fcvm import config, host, setup
from fcvm.storage.layout import Layout

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "build/bench"
BENCHES = ("start", "run", "clones", "guests", "network", "volumes", "nested")
WHERE_VMS_ARE = ("run", "guests")
REPORTED = ("run", "clones", "guests")


def command(name: str) -> list[str]:
    """How to run the bench ``name`` from here."""
    settings = config.load()
    results = RESULTS / f"{name}.json"
    if name not in WHERE_VMS_ARE or not host.uses_machine(settings):
        return [sys.executable, "-m", f"bench.{name}", *(["--json", str(results)] if name in REPORTED else [])]
    from fcvm.machine.sync import BASE, HOST, plan

    layout = Layout(settings.base_dir)
    wanted = plan(setup.find(settings, layout), layout.base)
    env = [f"PYTHONPATH={wanted.code}:{HOST}{ROOT}", f"FCVM_BASE_DIR={BASE}", f"FCVM_ASSETS={wanted.assets}"]
    return [
        sys.executable,
        "-m",
        "fcvm",
        "machine",
        "ssh",
        "--",
        "env",
        *env,
        "python3",
        "-m",
        f"bench.{name}",
        "--json",
        f"{HOST}{results}",
    ]


def main() -> int:
    code = 0
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or BENCHES:
        if not (ROOT / "bench" / f"{name}.py").exists():
            print(f"There is no bench named {name}; there are: {', '.join(BENCHES)}.", file=sys.stderr)
            return 125
        print(f"\n=== {name}", flush=True)
        code |= subprocess.run(command(name), cwd=ROOT, check=False).returncode
    if code == 0:
        code = subprocess.run([sys.executable, "-m", "bench.report"], cwd=ROOT, check=False).returncode
    return code


if __name__ == "__main__":
    sys.exit(main())
