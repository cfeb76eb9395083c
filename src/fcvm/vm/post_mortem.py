"""Why a VM ended by itself, told from what is left of it."""

from __future__ import annotations

from fcvm.errors import FcvmError, GuestError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fcvm.firecracker.process import Firecracker
    from fcvm.vm.spec import RunSpec


def why(firecracker: Firecracker, spec: RunSpec) -> FcvmError:
    """The error for a VM whose Firecracker has ended: its console tells, as panic=-1 makes that exit with 0 after a kernel panic."""
    console = firecracker.console
    code = firecracker.process.returncode
    if code < 0:  # whatever the guest does, it exits
        return GuestError(f"Firecracker was killed by signal {-code} before the container had ended.{console.quote()}")
    text = "\n".join(console.lines(200))
    if "Out of memory" in text or "out of memory" in text or "oom-kill" in text:
        return GuestError(
            f"The guest ran out of memory ({spec.memory} MiB).{console.quote()}", hint=f"--mem {spec.memory * 2}"
        )
    if "Kernel panic" in text:
        reason = text.split("Kernel panic", 1)[1].splitlines()[0].removeprefix(" - ").strip()
        return GuestError(f"The guest's kernel panicked: {reason}.{console.quote()}")
    return GuestError(f"Firecracker exited with code {code} before the container had ended.{console.quote()}")
