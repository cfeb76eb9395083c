"""The exceptions of fuse_pipe; what fails in a request is an ``OSError`` whose errno goes back to the kernel."""


class FusePipeError(Exception):
    """Base of the errors raised on purpose."""


class ProtocolError(FusePipeError):
    """A peer sent something that is not the protocol: its connection ends, nothing else does."""


class ConnectionLost(FusePipeError):
    """The peer went away; a relay connects again."""
