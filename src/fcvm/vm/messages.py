"""What a VM's supervisor does about each message of the agent: docs/architecture.md, "Control"."""

from __future__ import annotations

import time
from collections.abc import Callable

from fcvm import log
from fcvm.errors import AgentError
from fcvm.vm import plan, state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fcvm.vm.supervisor import Supervisor

    Handler = Callable[["Supervisor", dict[str, Any]], None]


def deal(vm: Supervisor, message: dict[str, Any]) -> None:
    """Do what is to be done about ``message``; raises AgentError if the VM, or a request under way, cannot go on."""
    handler = HANDLERS.get(message["type"])
    if handler is None:
        log.debug(f"{vm.spec.name}: the agent sent {message['type']!r}, which is not known")
    else:
        handler(vm, message)


def _hello(vm: Supervisor, message: dict[str, Any]) -> None:
    """The agent has connected (again): what either of us has said may have been lost, and its state tells what has."""
    known = message.get("state", {})
    phase = known.get("phase")
    vm.freezing.hello(known, running=vm.phase == "running")
    if phase == "waiting":
        vm.timings.mark("agent")
        if vm.start.captures and vm.phase in ("starting", "warming"):
            _enter(vm, "warming")
            vm.control.send({"type": "warm"})
        else:
            _send_plan(vm)
    elif vm.phase == "planned" and known.get("container_id"):
        _started(vm, known)
    elif vm.phase == "restored" and known.get("machine_id") == vm.machine_id:
        _ready(vm, known)
    elif vm.phase in ("starting", "restored") and phase == "running":
        _enter(vm, "restored")
        vm.identified_at = time.time_ns()
        vm.control.send(plan.restored(vm))
    if known.get("health"):
        _health(vm, {"status": known["health"]})
    if known.get("exit") and vm.exit is None:
        _exit(vm, known["exit"])


def _enter(vm: Supervisor, phase: str) -> None:
    """Be in ``phase``, which may take as long as the start before it, however often the agent connects meanwhile."""
    if vm.phase != phase:
        vm.phase = phase
        vm.deadline = time.monotonic() + vm.start.timeout


def _arrived(vm: Supervisor) -> None:
    """Wait no longer for a step of the start; only, if a stop was asked for meanwhile, for the end."""
    if not vm.stop_sent:
        vm.deadline = None


def _warmed(vm: Supervisor, message: dict[str, Any]) -> None:
    """The agent has run a container of its own once: now a snapshot has in memory all that the next ones need."""
    if vm.phase == "warming" and not vm.killing:
        vm.timings.mark("warm")
        vm.phase = "captured"
        if not vm.start.capture(vm):
            _send_plan(vm)


def _send_plan(vm: Supervisor) -> None:
    """Tell the agent what to do; again, if its connection broke before it had read that."""
    vm.phase = "planned"
    _arrived(vm)
    vm.identified_at = time.time_ns()
    vm.control.send(plan.message(vm))


def _stage(vm: Supervisor, message: dict[str, Any]) -> None:
    vm.timings.guest(str(message.get("name"))[:80], float(message["uptime"]))
    if message.get("name") == "plan":  # it has its identity
        vm.clock.was_set(vm.identified_at)


def _started(vm: Supervisor, message: dict[str, Any]) -> None:
    if vm.phase == "planned":
        vm.timings.mark("podman")
        _run(vm)


def _ready(vm: Supervisor, message: dict[str, Any]) -> None:
    if vm.phase == "restored":
        vm.timings.mark("identity")
        vm.clock.was_set(vm.identified_at)
        vm.freezing.thawed()
        _run(vm)


def _run(vm: Supervisor) -> None:
    """The container runs: it can be attached to."""
    _arrived(vm)
    vm.phase = "running"
    if not vm.stop_sent:
        vm.entry.update(status="running")
    vm.attachable.set()
    vm.on_started()
    vm.start.started(vm)


def _frozen(vm: Supervisor, message: dict[str, Any]) -> None:
    vm.freezing.answered(message)


def _clock(vm: Supervisor, message: dict[str, Any]) -> None:
    vm.clock.answered(message)


def _health(vm: Supervisor, message: dict[str, Any]) -> None:
    status = message.get("status")
    if status not in state.HEALTH:
        return
    vm.entry.update(health=status)
    if status == "healthy" and vm.running and not vm.warmed:
        vm.warmed = True
        vm.ask({"op": "warm"})  # another snapshot may be under way at this moment


def _exit(vm: Supervisor, message: dict[str, Any]) -> None:
    vm.exit = message
    vm.entry.update(status="stopping", health="stopped")


def _error(vm: Supervisor, message: dict[str, Any]) -> None:
    """Without what it could not do there is no container, or no end of it; or no snapshot, whose request ends by this."""
    error = AgentError(f"The guest agent failed: {message.get('message')}")
    if not vm.running or vm.stop_sent or vm.freezing.waits:
        raise error
    log.warning(f"{vm.spec.name}: {error.message}")


HANDLERS: dict[str, Handler] = {
    "hello": _hello,
    "warmed": _warmed,
    "stage": _stage,
    "started": _started,
    "ready": _ready,
    "frozen": _frozen,
    "thawed": _frozen,
    "clock": _clock,
    "health": _health,
    "exit": _exit,
    "error": _error,
}
