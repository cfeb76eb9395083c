"""All measurements, or those named: ``python -m bench [start run clones network ...]``.

Each is a module of its own that prints a table, with its floor measured in the same run. Those in ``WHERE_VMS_ARE`` run
in the machine where there is no KVM.
"""

import subprocess
import sys
from pathlib import Path

from fcvm import config, host, setup
from fcvm.storage.layout import Layout

ROOT = Path(__file__).parent.parent
BENCHES = ("start", "run", "clones", "network", "volumes", "nested")
WHERE_VMS_ARE = ("run",)


def command(name: str) -> list[str]:
    """How to run the bench ``name`` from here."""
    settings = config.load()
    if name not in WHERE_VMS_ARE or not host.uses_machine(settings):
        return [sys.executable, "-m", f"bench.{name}"]
    from fcvm.machine.sync import BASE, HOST, plan

    layout = Layout(settings.base_dir)
    wanted = plan(setup.find(settings, layout), layout.base)
    env = [f"PYTHONPATH={wanted.code}:{HOST}{ROOT}", f"FCVM_BASE_DIR={BASE}", f"FCVM_ASSETS={wanted.assets}"]
    return [sys.executable, "-m", "fcvm", "machine", "ssh", "--", "env", *env, "python3", "-m", f"bench.{name}"]


def main() -> int:
    code = 0
    for name in sys.argv[1:] or BENCHES:
        if not (ROOT / "bench" / f"{name}.py").exists():
            print(f"There is no bench named {name}; there are: {', '.join(BENCHES)}.", file=sys.stderr)
            return 125
        print(f"\n=== {name}", flush=True)
        code |= subprocess.run(command(name), cwd=ROOT, check=False).returncode
    return code


if __name__ == "__main__":
    sys.exit(main())
