"""What other commands may ask a VM's supervisor to do, besides ending it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fcvm.errors import UsageError

if TYPE_CHECKING:
    from fcvm.vm.supervisor import Supervisor

Operation = Callable[["Supervisor", dict[str, Any]], dict[str, Any]]

OPERATIONS: dict[str, Operation] = {}


def perform(supervisor: "Supervisor", request: dict[str, Any]) -> dict[str, Any]:
    """Carry out ``request["op"]`` and return the answer; raises FcvmError."""
    operation = OPERATIONS.get(str(request.get("op")))
    if operation is None:
        raise UsageError(f"The VM's supervisor does not know the request {request.get('op')!r}.", hint="fcvm --version")
    return {"ok": True, **operation(supervisor, request)}
