"""Makes docs/performance.md's tables, and its plots, of what the benches found.

    python -m bench.report [--results DIR] [--docs DIR]

Each section stands between ``<!-- NAME -->`` and ``<!-- end NAME -->``; what is written around them stays, and so does a section
whose bench has not run.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "build/bench"
DOCS = ROOT / "docs"
Results = dict[str, Any]

HEAD = """# Performance

Measured by `make bench`, which remakes this page. Every number stands beside its floor: the same work done by hand, in the same run. Times
are medians in milliseconds. "Native" is the control plane on the host, with bare-metal guests of a few kilobytes; "emulated" is
with real guests in the machine, under QEMU's software emulation, where everything takes ten to fifty times as long as with KVM.
"""

# title, bench, where in its results, the most that the ratio may be
CLONES: list[tuple[str, str, tuple[str, ...], float]] = [
    ("pooled clone, request to resumed (native)", "clones", ("pooled clone, request to resumed",), 3.0),
    ("pooled clone, request to first answer (native)", "clones", ("pooled clone, request to first answer",), 1.5),
    ("direct clone, to resumed (native)", "clones", ("direct clone, to resumed",), 1.3),
    ("50 clones together, all resumed (native)", "clones", ("50 clones together", "resumed"), 1.5),
    ("50 clones together, all answered (native)", "clones", ("50 clones together", "answered"), 1.5),
    ("`fcvm exec` typed on the host, beside an interpreter's start where the VM is and `crun exec` (emulated)", "exec", ("exec",), 1.5),
    ("`fcvm exec` typed in the machine, beside an interpreter's start and `crun exec` (emulated)", "guests", ("exec",), 1.5),
    ("pooled clone, request to first exec (emulated)", "guests", ("pooled clone", "request to first exec"), 1.5),
    (
        '`fcvm snapshot run --exec "echo ready"`, whole process (emulated)',
        "guests",
        ("pooled clone", "snapshot run --exec, whole process"),
        1.3,
    ),
    ("many clones together, all answered (emulated)", "guests", ("clones together",), 1.5),
    (
        "`podman run` from a boot snapshot, beside Podman in a running guest (emulated)",
        "guests",
        ("podman run", "boot snapshot, beside podman run in a guest"),
        1.5,
    ),
    (
        "`podman run` from a boot snapshot, beside a cold one (emulated)",
        "guests",
        ("podman run", "boot snapshot, beside cold"),
        1 / 3,
    ),
]


def find(results: dict[str, Results], bench: str, path: tuple[str, ...]) -> Results | None:
    """The measurement at ``path`` of a bench's results; None if it was not made."""
    value: Any = results.get(bench)
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def against(target: float, kept: bool) -> str:
    """A target, and whether it was missed."""
    return f"{target:.2g}{'' if kept else ', missed'}"


def clones(results: dict[str, Results]) -> str:
    """Clones beside their floors."""
    rows = ["| what | floor, ms | fcvm, ms | ratio | target |", "| --- | ---: | ---: | ---: | --- |"]
    for title, bench, path, most in CLONES:
        found = find(results, bench, path)
        if found is not None:
            met = against(most, found["ratio"] <= most)
            rows.append(f"| {title} | {found['floor']['ms']:.2f} | {found['fcvm']['ms']:.2f} | {found['ratio']:.2f} | {met} |")
    return "\n".join(rows) + "\n\n![Clones beside their floors](performance-clones.png)\n"


def restore(results: dict[str, Results]) -> str:
    """The memory backends."""
    found = find(results, "clones", ("restore to first answer",))
    if not found:
        return ""
    rows = ["| page cache | memory from | ms | of file |", "| --- | --- | ---: | ---: |"]
    rows += [
        f"| {cache} | {way} | {value['ms']:.1f} | {value['ratio']:.2f} |"
        for cache, ways in found.items()
        for way, value in ways.items()
    ]
    return "\n".join(rows) + "\n\n![Restore to the first answer](performance-restore.png)\n"


def memory(results: dict[str, Results]) -> str:
    """What clones cost in memory."""
    found = find(results, "guests", ("memory per clone",))
    if not found:
        return ""
    rows = [
        "| nginx clones, each has served a page | PSS, MiB each | of that written by it | beyond | MemAvailable, MiB each |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    rows += [
        f"| {count} | {v['pss_mib']:.1f} | {v['written_mib']:.1f} | {v['beyond_mib']:.1f} | {v['available_mib']:.1f} |"
        for count, v in found.items()
    ]
    return "\n".join(rows) + "\n\n![Memory of clones](performance-memory.png)\n"


def throughput(results: dict[str, Results]) -> str:
    """What the networks carry."""
    found = find(results, "iperf", ("throughput",))
    target = find(results, "iperf", ("target",))
    if not found:
        return ""
    rows = ["| TCP by iperf3 | over | Mbit/s | beside | ratio | quartiles | target |", "| --- | --- | ---: | --- | ---: | --- | --- |"]
    for way, sides in found.items():
        for name, v in sides.items():
            met = against(target, v["ratio"] >= target) if name == "bridged" else ""
            low, high = v["quartiles"]
            beside = "| |" if v["of"] == name else f"{v['of']} | {v['ratio']:.2f} | {low:.2f} to {high:.2f}"
            rows.append(f"| {way} | {name} | {v['megabits']:.0f} | {beside} | {met} |")
    return "\n".join(rows) + "\n"


def start(results: dict[str, Results]) -> str:
    """What a command costs before it does anything."""
    found = find(results, "start", ("commands",))
    target = find(results, "start", ("target_beyond_ms",))
    if not found:
        return ""
    rows = ["| command | ms | beyond the interpreter, ms | of it CPU, ms | target |", "| --- | ---: | ---: | ---: | --- |"]
    for title, v in found.items():
        met = against(target, v["beyond_ms"] <= target) if v["target"] else ""
        rows.append(f"| {title} | {v['ms']:.1f} | {v['beyond_ms']:.1f} | {v['cpu_beyond_ms']:.1f} | {met} |")
    return "\n".join(rows) + "\n"


def machine(results: dict[str, Results]) -> str:
    """What it was measured on."""
    rows = []
    for bench, where in (("clones", "Native"), ("guests", "Emulated")):
        found = find(results, bench, ("machine",))
        if found is not None:
            rows.append(
                f"{where}: {found['cpu']}, {found['cpus']} CPUs, Linux {found['kernel']}, Python {found['python']}, "
                f"load {found['load']:.1f} at the start."
            )
    return "  \n".join(rows) + "\n"


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Results]], str], tuple[str, ...]]] = {
    "measured on": ("Measured on", machine, ("clones",)),
    "start": ("The start of a command", start, ("start",)),
    "clones": ("Clones", clones, ("clones", "guests")),
    "restore": ("Where memory comes from", restore, ("clones",)),
    "memory": ("Memory", memory, ("guests",)),
    "throughput": ("Throughput", throughput, ("iperf",)),
}


def page(text: str, results: dict[str, Results]) -> str:
    """``text`` with the sections of which there are results made anew."""
    for name, (title, make, needs) in SECTIONS.items():
        made = make(results) if any(bench in results for bench in needs) else ""
        if not made:
            continue
        section = f"<!-- {name} -->\n{made}<!-- end {name} -->"
        old = re.compile(f"<!-- {name} -->.*?<!-- end {name} -->", re.DOTALL)
        text = old.sub(lambda _, new=section: new, text) if old.search(text) else f"{text}\n## {title}\n{section}\n"  # type: ignore[misc]
    return text


def plot(results: dict[str, Results], docs: Path) -> None:
    """The plots of which there are results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [(title.replace("`", ""), found) for title, b, p, _ in CLONES if (found := find(results, b, p)) is not None]
    if rows:
        figure, axes = pyplot.subplots(figsize=(9, 0.6 * len(rows) + 1.2))
        for side, offset in (("floor", 0.2), ("fcvm", -0.2)):
            places = [-n + offset for n in range(len(rows))]
            axes.barh(places, [found[side]["ms"] for _, found in rows], height=0.38, label=side)
        axes.set_yticks([-n for n in range(len(rows))], [title for title, _ in rows], fontsize=8)
        axes.set_xscale("log")
        axes.set_xlabel("milliseconds (log scale)")
        axes.legend()
        _save(figure, docs / "performance-clones.png")
    found = find(results, "clones", ("restore to first answer",))
    if found:
        figure, axes = pyplot.subplots(figsize=(6, 3))
        ways = list(next(iter(found.values())))
        for number, way in enumerate(ways):
            places = [n + (number - 1) * 0.27 for n in range(len(found))]
            axes.bar(places, [found[cache][way]["ms"] for cache in found], width=0.25, label=way)
        axes.set_xticks(range(len(found)), [f"{cache} page cache" for cache in found])
        axes.set_ylabel("ms to the first answer")
        axes.legend()
        _save(figure, docs / "performance-restore.png")
    found = find(results, "guests", ("memory per clone",))
    if found:
        figure, axes = pyplot.subplots(figsize=(6, 3))
        axes.bar(list(found), [v["written_mib"] for v in found.values()], label="written by the clone")
        axes.bar(
            list(found),
            [v["beyond_mib"] for v in found.values()],
            bottom=[v["written_mib"] for v in found.values()],
            label="its share of the rest",
        )
        axes.set_ylabel("PSS, MiB a clone")
        axes.legend()
        _save(figure, docs / "performance-memory.png")


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args(arguments)
    results = {path.stem: json.loads(path.read_text()) for path in sorted(args.results.glob("*.json"))}
    target = args.docs / "performance.md"
    target.write_text(page(target.read_text() if target.exists() else HEAD, results))
    plot(results, args.docs)
    print(target)


if __name__ == "__main__":
    main()
