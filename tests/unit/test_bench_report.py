"""The page of performance is made of what the benches found, and can be made again."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import report


def beside(floor: float, ours: float) -> dict[str, object]:
    return {"floor": {"ms": floor}, "fcvm": {"ms": ours}, "ratio": round(ours / floor, 2)}


def test_tables_and_plots_are_made_and_made_again(tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    found = {
        "machine": {"cpu": "a CPU", "cpus": 2, "kernel": "6", "python": "3.11", "load": 0.5},
        "pooled clone, request to resumed": beside(0.5, 0.8),
        "direct clone, to resumed": beside(10, 20),
        "restore to first answer": {"warm": {"file": {"ms": 1, "ratio": 1}, "uffd": {"ms": 2, "ratio": 2}}},
    }
    (results / "clones.json").write_text(json.dumps(found))
    costs = {"ms": 50.0, "beyond_ms": 31.0, "cpu_beyond_ms": 28.0}
    commands = {"fcvm ls": {**costs, "target": True}, "fcvm snapshot run": {**costs, "target": False}}
    (results / "start.json").write_text(json.dumps({"commands": commands, "target_beyond_ms": 30.0}))
    report.main(["--results", str(results), "--docs", str(docs)])
    page = (docs / "performance.md").read_text()
    assert "| pooled clone, request to resumed (native) | 0.50 | 0.80 | 1.60 | 3 |" in page
    assert "| 2.00 | 1.3, missed |" in page
    assert "| fcvm ls | 50.0 | 31.0 | 28.0 | 30, missed |" in page
    assert "| fcvm snapshot run | 50.0 | 31.0 | 28.0 |  |" in page
    assert "<!-- memory -->" not in page
    assert (docs / "performance-clones.png").stat().st_size > 1000

    (docs / "performance.md").write_text(page + "\nWritten by hand.\n")
    found["pooled clone, request to resumed"] = beside(0.5, 0.9)
    (results / "clones.json").write_text(json.dumps(found))
    report.main(["--results", str(results), "--docs", str(docs)])
    again = (docs / "performance.md").read_text()
    assert again == page.replace("0.80 | 1.60", "0.90 | 1.80") + "\nWritten by hand.\n"
