"""Network and user namespaces that exist only as file descriptors.

Nothing is bound to a path under /run/netns: a namespace lives as long as an fd or a process holds it, so when its owner and
the processes in it are gone, however they went, the kernel takes it apart, with the taps and veths in it.

The caller's own namespaces never change. ``setns`` and ``unshare`` of a network namespace act on one thread, so that work
is done in a thread which then ends. A user namespace can only be made or entered by a process with a single thread, so that
is done in a forked child, which sends back the fds that it opened.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import socket
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fc_agent.structs import Struct
from fcvm.errors import OPEN_FILES, FcvmError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    T = TypeVar("T")

# linux/sched.h
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

_MAX_FDS = 64
_libc = ctypes.CDLL(None, use_errno=True)


def setns(fd: int, kind: int) -> None:
    """Move the calling thread into the namespace of ``fd``.

    Raises:
        OSError: EPERM without the rights; EINVAL for a user namespace when this process has several threads.
    """
    if _libc.setns(fd, kind) != 0:
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")


def unshare(kind: int) -> None:
    """Move the calling thread into new namespaces.

    Raises:
        OSError: EPERM without the rights; ENOSPC when user.max_*_namespaces is reached.
    """
    if _libc.unshare(kind) != 0:
        raise OSError(ctypes.get_errno(), f"unshare: {os.strerror(ctypes.get_errno())}")


def current() -> int:
    """An fd of the network namespace that the calling thread is in."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


class Namespace(Struct):
    """A network namespace, and the user namespace that owns it unless that is our own; a context manager."""

    net: int
    user: int | None = None

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def enter(self) -> None:
        """Move the calling thread in, for good: meant for a child between fork and exec.

        With a user namespace the process is root in there, and has no rights outside.
        """
        if self.user is not None:
            setns(self.user, CLONE_NEWUSER)
        setns(self.net, CLONE_NEWNET)

    def close(self) -> None:
        """Let go of it. It is gone when the last process in it is."""
        for fd in (self.net, self.user):
            if fd is not None:
                with suppress(OSError):
                    os.close(fd)


def create(build: Callable[[], list[int]], *, user: bool) -> tuple[Namespace, list[int]]:
    """A new network namespace, furnished by ``build``, and the fds that ``build`` opened in it (sockets, say).

    Arguments:
        build: called inside; what it raises is raised here and the namespace is gone. With ``user`` it runs in a forked
            child: it can change nothing in this process, and of exceptions only FcvmError and OSError keep their type.
        user: make a user namespace as well, in which the caller's user is root: needs no rights.

    Raises:
        HostError: this host does not let us make one; the hint says what to change.
    """

    def furnish() -> list[int]:
        (_unshare_user if user else _unshare_net)()
        own: list[int] = []
        try:  # build last: nobody else closes what it has opened
            own.append(current())
            if user:
                own.append(os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC))
            return [*build(), *own]
        except BaseException:
            for fd in own:
                os.close(fd)
            raise

    if user:
        (*fds, net, owner) = _in_child(furnish)
        return Namespace(net, owner), fds
    (*fds, net) = in_thread(furnish)
    return Namespace(net), fds


def inside(namespace: Namespace, function: Callable[[], list[int]]) -> list[int]:
    """Call ``function`` inside ``namespace`` and return the fds that it opened there; see ``create`` for its limits."""

    def work() -> list[int]:
        namespace.enter()
        return function()

    return in_thread(work) if namespace.user is None else _in_child(work)


def in_thread(function: Callable[[], T]) -> T:
    """Call ``function`` in a thread of its own, which may change its namespaces, and return or raise what it does."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _in_child(function: Callable[[], list[int]]) -> list[int]:
    """Call ``function`` in a forked child; the fds it returns arrive by SCM_RIGHTS, its error as JSON."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    with ours, theirs, warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads; the child takes no lock that another thread could hold
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
        if child == 0:
            gc.disable()  # a collection would copy every page that holds an object
            try:
                _report(theirs, function)
            finally:
                os._exit(0)
        theirs.close()
        try:
            data, fds, flags, _ = socket.recv_fds(ours, 1 << 16, _MAX_FDS)
        finally:
            os.waitpid(child, 0)
    if flags & socket.MSG_CTRUNC:  # which of them are missing is not said
        for fd in fds:
            os.close(fd)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    for fd in fds:
        os.set_inheritable(fd, False)
    answer = json.loads(data) if data else {"kind": "RuntimeError", "text": "the child died"}
    if "kind" in answer:
        raise _error(answer)
    return fds


def _report(channel: socket.socket, function: Callable[[], list[int]]) -> None:
    fds: list[int] = []
    try:
        fds = function()
        answer: dict[str, object] = {}
    except FcvmError as error:
        answer = {"kind": type(error).__name__, "text": error.message, "hint": error.hint}
    except OSError as error:
        answer = {"kind": "OSError", "text": str(error.strerror or error), "errno": error.errno or errno.EIO}
    except BaseException:
        import traceback

        answer = {"kind": "RuntimeError", "text": traceback.format_exc()}
    socket.send_fds(channel, [json.dumps(answer).encode()], fds)


def _error(answer: dict[str, object]) -> Exception:
    kind, text = str(answer["kind"]), str(answer["text"])
    if kind == "OSError":
        return OSError(answer["errno"], text)
    for deliberate in FcvmError.__subclasses__():
        if deliberate.__name__ == kind:
            hint = answer["hint"]
            return deliberate(text, hint=hint if isinstance(hint, str) else None)
    return RuntimeError(text)


def _unshare_net() -> None:
    try:
        unshare(CLONE_NEWNET)
    except OSError as error:
        raise refusal(error.errno or errno.EIO, user=False) from error


def _unshare_user() -> None:
    """Become root of a new user namespace that knows one user only: ourselves. Needs neither newuidmap nor /etc/subuid."""
    uid, gid = os.geteuid(), os.getegid()
    try:
        unshare(CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")  # the kernel's condition for a gid_map without CAP_SETGID
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        unshare(CLONE_NEWNET)
    except OSError as error:
        raise refusal(error.errno or errno.EIO, user=True) from error


def refusal(number: int, *, user: bool, sysctl: Path = Path("/proc/sys")) -> HostError:
    """Why this host refuses a namespace with that errno, and what to change, as far as its sysctls tell.

    Arguments:
        user: it was a user namespace with a network namespace in it, not a network namespace alone.
        sysctl: where the sysctls are.
    """

    def value(name: str) -> str:
        try:
            return (sysctl / name.replace(".", "/")).read_text().strip()
        except OSError:
            return ""

    what = "a user namespace" if user else "a network namespace"
    if user and value("kernel.apparmor_restrict_unprivileged_userns") == "1" and number in (errno.EPERM, errno.EACCES):
        return HostError(
            "AppArmor on this host does not let ordinary users use user namespaces, which rootless networking needs.",
            hint="sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0, or run fcvm as root",
        )
    if user and value("kernel.unprivileged_userns_clone") == "0":
        return HostError(
            "This host does not let ordinary users make user namespaces, which rootless networking needs.",
            hint="sudo sysctl kernel.unprivileged_userns_clone=1",
        )
    for name in ("user.max_user_namespaces", "user.max_net_namespaces"):
        if number == errno.ENOSPC and (user or name.endswith("net_namespaces")) and value(name) == "0":
            return HostError(f"This host does not allow {what}: {name} is 0.", hint=f"sudo sysctl {name}=10000")
    if number == errno.ENOSPC:
        return HostError(
            f"This host has no room for {what}: a limit of user.max_*_namespaces is reached.",
            hint="sysctl user.max_user_namespaces user.max_net_namespaces",
        )
    if number in (errno.EMFILE, errno.ENFILE):
        return HostError(f"There are too many open files to make {what}.", hint=OPEN_FILES)
    if number == errno.EINVAL:
        return HostError(f"This host's kernel cannot make {what}.")
    if not user:
        return HostError(f"Making {what} was refused: {os.strerror(number)}.", hint="use --network rootless")
    return HostError(
        f"Making {what} was refused: {os.strerror(number)}. A container or a security policy usually forbids it.",
        hint="run fcvm outside the container, or as root with --network bridged",
    )
