"""All measurements, or those named: ``python -m bench [start run clones guests network ...] [--quick ...]``.

Options go to each of them.

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
BENCHES = ("start", "exec", "run", "clones", "guests", "network", "iperf", "volumes", "volumes_guest", "nested")
WHERE_VMS_ARE = ("run", "guests", "iperf", "volumes_guest")
REPORTED = ("start", "exec", "run", "clones", "guests", "iperf")


def command(name: str, options: list[str]) -> list[str]:
    """How to run the bench ``name`` from here."""
    settings = config.load()
    results = RESULTS / f"{name}.json"
    if name not in WHERE_VMS_ARE or not host.uses_machine(settings):
        return [sys.executable, "-m", f"bench.{name}", *options, *(["--json", str(results)] if name in REPORTED else [])]
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
        *options,
        "--json",
        f"{HOST}{results}",
    ]


def prepare() -> None:
    """See that the example images are where VMs run."""
    for name, command in (("demo", ["true"]), ("nginx", ["busybox", "true"]), ("iperf", ["--version"])):
        subprocess.run([sys.executable, str(ROOT / "examples/build"), name], stdout=subprocess.DEVNULL, check=True)
        once = ["podman", "run", "--no-snapshot", f"localhost/fcvm-{name}", "--", *command]
        subprocess.run([sys.executable, "-m", "fcvm", *once], cwd=ROOT, check=True)


def main() -> int:
    code = 0
    RESULTS.mkdir(parents=True, exist_ok=True)
    names = [word for word in sys.argv[1:] if not word.startswith("-")] or BENCHES
    options = [word for word in sys.argv[1:] if word.startswith("-")]
    if set(names) & {*WHERE_VMS_ARE, "exec"}:
        prepare()
    for name in names:
        if not (ROOT / "bench" / f"{name}.py").exists():
            print(f"There is no bench named {name}; there are: {', '.join(BENCHES)}.", file=sys.stderr)
            return 125
        print(f"\n=== {name}", flush=True)
        code |= subprocess.run(command(name, options), cwd=ROOT, check=False).returncode
    if code == 0:
        code = subprocess.run([sys.executable, "-m", "bench.report"], cwd=ROOT, check=False).returncode
    return code


if __name__ == "__main__":
    sys.exit(main())
