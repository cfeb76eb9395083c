"""Host directories and files in the guest: the kernel's FUSE messages, relayed to the host over vsock (``fuse_pipe``)."""

import contextlib
import functools
import os
import socket
from collections.abc import Callable

from fc_agent import linux, vsock
from fc_agent.container import VOLUMES
from fc_agent.protocol import VolumePlan

CHANNELS = 1  # one thread each way: more share one interpreter lock, and writes could overtake one another
ATTEMPTS = 5  # to mount; the host's server is given half a minute each time


def mount_all(volumes: list[VolumePlan]) -> None:
    """Mount every volume for the container, and at its own path in the guest where nothing is there.

    Raises:
        OSError, fuse_pipe.FusePipeError: a volume cannot be mounted.
    """
    if not volumes:
        return
    for index, volume in enumerate(volumes):
        place = f"{VOLUMES}/{index}"
        _make(place, file=volume.file)
        _mount(volume, place, f"fcvm-{index}")
        if not os.path.lexists(volume.path):
            with contextlib.suppress(OSError):
                _make(volume.path, file=volume.file)
                linux.mount(place, volume.path, "none", linux.MS_BIND | linux.MS_REC)


def _mount(volume: VolumePlan, place: str, source: str) -> None:
    """Mount one; a server that ends just then is another one soon."""
    from fuse_pipe.errors import ConnectionLost
    from fuse_pipe.relay import Relay

    for attempt in range(ATTEMPTS):
        try:
            Relay(_connector(volume.port), place, channels=CHANNELS, source=source).mount()
            return
        except (ConnectionLost, ConnectionError, TimeoutError):
            if attempt == ATTEMPTS - 1:
                raise


def _make(path: str, *, file: bool) -> None:
    os.makedirs(os.path.dirname(path) if file else path, exist_ok=True)
    if file:
        with open(path, "a"):
            pass


def _connector(port: int) -> Callable[[], socket.socket]:
    return functools.partial(vsock.connect, port)
