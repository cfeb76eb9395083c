"""Why a VM ended by itself, told from what is left of it."""

from __future__ import annotations

import re

from fcvm.errors import FcvmError, GuestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fcvm.firecracker.process import Firecracker
    from fcvm.vm.spec import RunSpec

# What the kernel says when it kills for want of memory (mm/oom_kill.c), or panics for it
NO_MEMORY = "[Oo]ut of memory|oom-kill|deadlocked on memory"


def why(firecracker: Firecracker, spec: RunSpec) -> FcvmError:
    """The error for a VM whose Firecracker has ended: its console tells, as panic=-1 makes that exit with 0 after a kernel panic."""
    console = firecracker.console
    code = firecracker.process.returncode
    if code < 0:  # whatever the guest does, it exits
        return GuestError(f"Firecracker was killed by signal {-code} before the container had ended.{console.quote()}")
    text = "\n".join(console.lines(200))
    panic = re.search("Kernel panic(?: - )?(.*)", text)
    if re.search(NO_MEMORY, panic[1] if panic else text):  # a panic says its own reason; a killed process may have been survived
        return GuestError(
            f"The guest ran out of memory ({spec.memory} MiB).{console.quote()}", hint=f"--mem {spec.memory * 2}"
        )
    if panic:
        return GuestError(f"The guest's kernel panicked: {panic[1].strip()}.{console.quote()}")
    return GuestError(f"Firecracker exited with code {code} before the container had ended.{console.quote()}")
