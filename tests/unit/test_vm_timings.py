"""The table of `podman run --timings`."""

import pytest

from fcvm.vm.timings import Timings


def test_the_kernels_share_of_a_boot_is_a_stage_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    timings = Timings()
    timings.begun -= 10
    timings.mark("configure")
    timings.begun -= 5
    timings.mark("agent")
    timings.guest("kernel", 3.0)
    timings.mark("end")
    timings.print()
    rows = capsys.readouterr().err.splitlines()
    assert [row.split()[0] for row in rows] == ["configure", "kernel", "agent", "end", "guest:"]
    assert [float(row.split()[1]) for row in rows[:3]] == pytest.approx([10, 3, 2], abs=0.5)


def test_a_restored_guest_boots_no_kernel_and_a_stage_counts_once() -> None:
    timings = Timings()
    for stage in ("resume", "agent", "agent"):
        timings.mark(stage)
    timings.guest("kernel", 3.0)
    assert [name for name, _ in timings.marks] == ["resume", "agent"]
