"""Every error that fcvm raises on purpose, in one tree.

An error says what happened in one plain sentence, carries a ``hint`` with the exact next command where there is
one, and knows the exit code of the command that it ends. Exit codes follow Podman's convention:

    125  fcvm itself failed (this module's default)
    126  the container's command could not be invoked
    127  the container's command was not found
    else the container's own code, 128+N for signal N

    FcvmError
    ├── UsageError          a value that the user gave is wrong
    ├── NotFoundError       the VM, image, snapshot or file named does not exist
    ├── ConflictError       the name or port asked for is taken
    ├── SetupError          something that `fcvm setup` provides is missing or broken
    ├── HostError           this host lacks something: KVM, a program, a permission, disk space
    ├── ProcessError        another program failed
    ├── ImageError          an image cannot be had or used
    ├── FirecrackerError    the VMM refused a request or died
    ├── AgentError          the guest agent refused, is unreachable, or died
    ├── GuestError          the guest died: kernel panic, out of memory
    ├── ContainerError      Podman could not run the container (125, 126 or 127)
    ├── NetworkError        the network could not be set up
    ├── SnapshotError       a snapshot cannot be made, read or restored
    ├── VolumeError         a host directory cannot be mapped
    └── MachineError        the emulated host does not start or answer
"""

import errno

OPEN_FILES = "ulimit -n says how many a process may have open, sysctl fs.file-nr how many all have and may"  # a hint
HINTS = {errno.ENOSPC: "df -h", errno.EMFILE: OPEN_FILES, errno.ENFILE: OPEN_FILES}


class FcvmError(Exception):
    """Base of all deliberate errors: ``message`` for the user, optional ``hint``, and the process's ``exit_code``."""

    exit_code = 125

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if exit_code is not None:
            self.exit_code = exit_code


class UsageError(FcvmError):
    """A value that the user gave is wrong."""


class NotFoundError(FcvmError):
    """The VM, image, snapshot or file named does not exist."""


class ConflictError(FcvmError):
    """The name or port asked for is taken."""


class SetupError(FcvmError):
    """Something that ``fcvm setup`` provides is missing or broken."""


class HostError(FcvmError):
    """This host lacks something: KVM, a program, a permission, disk space."""


class ProcessError(FcvmError):
    """Another program failed; the message shows its command line and the end of what it printed."""


class ImageError(FcvmError):
    """An image cannot be had or used."""


class FirecrackerError(FcvmError):
    """The VMM refused a request or died."""


class AgentError(FcvmError):
    """The guest agent refused, is unreachable, or died."""


class GuestError(FcvmError):
    """The guest died: a kernel panic, out of memory, a full disk."""


class ContainerError(FcvmError):
    """Podman could not run the container; the exit code is 125, 126 or 127 as Podman's would be."""


class NetworkError(FcvmError):
    """The network could not be set up."""


class SnapshotError(FcvmError):
    """A snapshot cannot be made, read or restored."""


class VolumeError(FcvmError):
    """A host directory cannot be mapped."""


class MachineError(FcvmError):
    """The emulated host does not start or does not answer."""


def of_system(error: OSError, *, hint: str) -> FcvmError:
    """A failed system call that nobody has foreseen, as an error of ours; ``hint`` is for those that have none of their own."""
    where = f"{error.filename}: " if error.filename else ""
    return FcvmError(f"{where}{error.strerror or error}.", hint=HINTS.get(error.errno or 0, hint))
