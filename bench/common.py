"""What the benches share: summaries beside a floor, memory, what it was measured on, lines of text."""

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import fcvm
from fcvm.images import store
from fcvm.images.store import Image
from fcvm.storage.layout import Layout
from fcvm.vm.spec import ImageUse

FCVM = [sys.executable, "-P", str(Path(fcvm.__file__).with_name("__main__.py"))]  # like the installed command: -m would cost runpy
INTERPRETER = [sys.executable, "-c", "pass"]


def now() -> float:
    return time.perf_counter()


def image(layout: Layout, name: str) -> tuple[Image, ImageUse]:
    """The example image ``name``, known by its configuration: in the machine images have no names."""
    for found, _ in store.images(layout):
        if name in json.dumps(found.config):
            return found, ImageUse(f"localhost/fcvm-{name}", found.id, found.digest, str(found.path))
    raise SystemExit(f"There is no image localhost/fcvm-{name} where VMs run: examples/build {name}, and run it once")


def summary(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median, 90th percentile, and the best: what it takes when nothing else wants the CPUs."""
    ordered = sorted(seconds)
    return {
        "ms": round(statistics.median(ordered) * 1e3, 3),
        "best_ms": round(ordered[0] * 1e3, 3),
        "p90_ms": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.9))] * 1e3, 3),
        "n": len(ordered),
    }


def beside(floor: list[float], ours: list[float]) -> dict[str, Any]:
    a, b = summary(floor), summary(ours)
    return {
        "floor": a,
        "fcvm": b,
        "ratio": round(b["ms"] / a["ms"], 2),
        "best_ratio": round(b["best_ms"] / a["best_ms"], 2),
    }


def pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise RuntimeError("no Pss")


def available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1])
    raise RuntimeError("no MemAvailable")


def show(name: str, result: dict[str, Any], indent: str = "") -> None:
    """A measurement as lines of text."""
    if "ratio" in result and "floor" in result:
        print(
            f"{indent}{name:<40} floor {result['floor']['ms']:9.3f} ms   fcvm {result['fcvm']['ms']:9.3f} ms"
            f"   x {result['ratio']:.2f}   best {result['floor']['best_ms']:.3f} and {result['fcvm']['best_ms']:.3f} ms"
            f"   x {result['best_ratio']:.2f}"
        )
    elif all(not isinstance(value, dict) for value in result.values()):
        print(f"{indent}{name:<40} " + "   ".join(f"{key} {value}" for key, value in result.items()))
    else:
        print(f"{indent}{name}")
        for key, value in result.items():
            show(key, value, indent + "  ")


def machine() -> dict[str, Any]:
    """What it was measured on."""
    from fcvm.snapshots.manifest import this_host

    return {
        "cpu": this_host().cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }
