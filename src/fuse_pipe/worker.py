"""What belongs to one serving thread: the caller that it acts for, its umask, and the request at hand.

As root, files that a request makes belong to the caller, so the thread takes the caller's file system user and group
(setfsuid, setfsgid: per thread) and keeps its capabilities; everything else is done as root. Whether the caller *may* is decided by the kernel on the
other side, which alone knows the caller's groups; it does so by the attributes and ACLs of the files (the mount option
``default_permissions``). CAP_FSETID goes when that kernel asks for set-user-ID bits to be cleared. Without root, all
requests act as the serving user.
"""

import os
import stat
import threading

from fuse_pipe import linux


class Worker:
    """The state of the calling thread; make it in the thread that uses it."""

    __slots__ = (
        "_capabilities",
        "_fsetid",
        "_gid",
        "_groups",
        "_uid",
        "_umask",
        "acts",
        "gid",
        "groups",
        "nodeid",
        "pid",
        "quiet",
        "root",
        "uid",
        "unique",
    )

    def __init__(self) -> None:
        self.root = os.geteuid() == 0
        linux.own_umask()
        os.umask(0)
        if self.root:
            linux.keep_capabilities()
        self._capabilities = linux.capabilities()
        self._uid, self._gid, self._umask, self._fsetid = os.geteuid(), os.getegid(), 0, True
        self._groups: tuple[int, ...] = ()
        self.unique = self.nodeid = self.uid = self.gid = self.pid = 0
        self.groups: tuple[int, ...] = ()
        self.quiet = False  # the request at hand was answered already
        self.acts = False  # for a caller that is not root

    def become_caller(self, umask: int, mode: int = 0) -> None:
        """Files made from now on belong to the caller and get its ``umask`` (where no default ACL replaces it)."""
        if mode & stat.S_ISGID:  # whether the caller may was judged where its groups are known
            self.keep_setid(True)
        if umask != self._umask:
            os.umask(umask & 0o777)
            self._umask = umask
        if self.root:
            self._be(self.uid, self.gid, self.groups)

    def be_root(self) -> None:
        """Act for no caller any more."""
        self._be(0, 0, ())

    def _be(self, uid: int, gid: int, groups: tuple[int, ...]) -> None:
        self.acts = uid != 0 or gid != 0 or groups != ()
        if groups != self._groups:
            linux.setgroups(groups)
            self._groups = groups
        if gid != self._gid:
            linux.setfsgid(gid)
            self._gid = gid
        if uid != self._uid:
            linux.setfsuid(uid)
            self._uid = uid

    def keep_setid(self, keep: bool) -> None:
        """Whether writing and truncating leaves set-user-ID and set-group-ID bits (only CAP_FSETID does)."""
        if self.root and keep != self._fsetid:
            effective = self._capabilities[0]
            linux.set_capabilities(
                (effective if keep else effective & ~(1 << linux.CAP_FSETID), *self._capabilities[1:])
            )
            self._fsetid = keep


_local = threading.local()


def this_worker() -> Worker:
    """The calling thread's own ``Worker``."""
    worker: Worker | None = getattr(_local, "worker", None)
    if worker is None:
        worker = _local.worker = Worker()
    return worker
