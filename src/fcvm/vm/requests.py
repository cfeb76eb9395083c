"""What a VM's supervisor does about requests: those of other commands (vm/rpc.py), and those of its own threads."""

from __future__ import annotations

import time

from fcvm import log
from fcvm.errors import FcvmError
from fcvm.vm import operations, rpc, warm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fcvm.vm.supervisor import Supervisor

STOP_MARGIN = 60.0  # seconds beyond the stop timeout in which the agent must report the end, before the VM is killed
UNPLANNED = ("starting", "warming", "captured")  # phases in which there is no container to stop, and a boot snapshot may be taken


def serve(vm: Supervisor) -> None:
    """Take one request of another command and carry it out; whoever asked to stop the VM is answered at its end."""
    try:
        connection, _ = vm.requests.accept()
    except OSError as error:  # no descriptors left, perhaps not for long
        log.warning(f"{vm.spec.name}: a request cannot be read: {error.strerror}")
        time.sleep(0.1)
        return
    connection.settimeout(5.0)
    try:
        request = rpc.receive(connection)
        if request.get("op") in ("stop", "kill"):
            vm.waiting.append(connection)
            carry_out(vm, request)
        else:
            rpc.answer(connection, operations.perform(vm, request))
    except FcvmError as error:
        rpc.answer(connection, rpc.failure(error))
    except (OSError, ValueError) as error:
        rpc.answer(connection, {"error": f"The request cannot be carried out: {error}."})


def answer_waiting(vm: Supervisor, reply: dict[str, Any]) -> None:
    """Tell whoever asked to stop the VM how that went."""
    for connection in vm.waiting:
        rpc.answer(connection, reply)
    vm.waiting.clear()


def carry_out(vm: Supervisor, request: dict[str, Any]) -> None:
    """Do what needs no answer."""
    if request["op"] in ("unreachable", "reachable"):
        vm.refusals.note(request["ports"], loopback_only=request["op"] == "unreachable")
        vm.entry.update(network=vm.shown)
        return
    if request["op"] == "warm":
        if vm.running and not vm.stop_sent:
            warm.capture(vm, vm.start.warm)
        return
    if request["op"] == "signal":
        if vm.running:
            vm.control.send({"type": "kill", "signal": request["signal"]})
        return
    if request["op"] == "kill" or vm.phase in UNPLANNED:
        vm.kill()
        return
    timeout = request.get("timeout")
    timeout = vm.spec.stop_timeout if timeout is None else timeout
    vm.entry.update(status="stopping")
    vm.control.send({"type": "stop", "timeout": timeout})
    vm.stop_sent = True
    vm.deadline = time.monotonic() + timeout + STOP_MARGIN
