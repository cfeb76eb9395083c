"""Doing the same with each of several things that the user has named."""

from collections.abc import Callable, Iterable

from fcvm.cli.main import report
from fcvm.errors import FcvmError


def each(names: Iterable[str], act: Callable[[str], None]) -> None:
    """Call ``act`` with every name once. What fails is told and, as with Podman, the others are not left out.

    Raises:
        FcvmError: the last one, which is told by whoever catches it.
    """
    failed: list[FcvmError] = []
    for name in dict.fromkeys(names):
        try:
            act(name)
        except FcvmError as error:
            failed.append(error)
    for one in failed[:-1]:
        report(one)
    if failed:
        raise failed[-1]
