"""The FUSE wire protocol over a byte stream: a host directory, mounted elsewhere. Standard library only.

The host serves, the guest mounts /dev/fuse itself and relays its messages::

    fuse_pipe.serve(listener, "/srv/data", read_only=False)           # host; or fuse_pipe.Server for more control
    fuse_pipe.mount_and_relay(connect, "/mnt/data", channels=2)       # guest; connect() gives a stream socket

``messages`` defines the protocol, ``channel`` the stream that survives its connections. Imports nothing of ``fcvm``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuse_pipe.errors import ConnectionLost, FusePipeError, ProtocolError
    from fuse_pipe.relay import Relay, mount_and_relay, mounted
    from fuse_pipe.server import Server, serve

__all__ = ["ConnectionLost", "FusePipeError", "ProtocolError", "Relay", "Server", "mount_and_relay", "mounted", "serve"]

_WHERE = {
    "ConnectionLost": "errors",
    "FusePipeError": "errors",
    "ProtocolError": "errors",
    "Relay": "relay",
    "mount_and_relay": "relay",
    "mounted": "relay",
    "Server": "server",
    "serve": "server",
}


def __getattr__(name: str) -> Any:
    """The guest imports the relay only, the host the server only."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
