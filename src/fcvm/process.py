"""The only place that starts other programs.

``run`` waits and returns what was printed; ``spawn`` returns a running child. Both give the child no stdin, a
minimal environment unless told otherwise, and (``spawn``) a life bound to the calling thread's process by
``PR_SET_PDEATHSIG``, so that a SIGKILL of fcvm leaves no helper behind. A failing command is shown in the error so
that it can be pasted into a shell.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence

from fcvm.errors import HostError, ProcessError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any

# <linux/prctl.h>
PR_SET_PDEATHSIG = 1

KEEP_ENVIRONMENT = ("PATH", "HOME", "USER", "LANG", "TERM", "TMPDIR", "XDG_RUNTIME_DIR", "SSL_CERT_FILE",
                    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment given to children: a short list of our own variables, sbin on PATH, and ``extra``."""
    env = {name: os.environ[name] for name in KEEP_ENVIRONMENT if name in os.environ}
    path = env.get("PATH", "/usr/local/bin:/usr/bin:/bin").split(":")
    env["PATH"] = ":".join([*path, *(d for d in ("/usr/local/sbin", "/usr/sbin", "/sbin") if d not in path)])
    env.update(extra or {})
    return env


def find(program: str, *, package: str | None = None) -> str:
    """The absolute path of ``program``, looked up on PATH and in the sbin directories.

    Raises:
        HostError: it is not installed; the hint names the Debian ``package`` (the program's own name by default).
    """
    from shutil import which

    found = which(program, path=environment()["PATH"])
    if found is None:
        raise HostError(f"{program} is not installed.", hint=f"apt-get install {package or program}")
    return found


def run(
    command: Sequence[str | os.PathLike[str]],
    *,
    input: bytes | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    check: bool = True,
    timeout: float | None = None,
    stdout: int | IO[Any] | None = subprocess.PIPE,
    pass_fds: Sequence[int] = (),
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end and return it with ``stdout`` and ``stderr`` as bytes.

    Arguments:
        input: bytes for its stdin; without it stdin is /dev/null.
        env: variables added to ``environment()``.
        timeout: seconds after which it is killed.

    Raises:
        HostError: the program is not installed.
        ProcessError: with ``check``, it exited with another code than 0, or took longer than ``timeout``.
    """
    argv = [os.fspath(word) for word in command]
    argv[0] = argv[0] if "/" in argv[0] else find(argv[0])
    try:
        done = subprocess.run(
            argv,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=environment(env),
            cwd=cwd,
            timeout=timeout,
            pass_fds=pass_fds,
            preexec_fn=_die_with_parent(os.getpid()),
        )
    except FileNotFoundError as error:
        raise HostError(f"{argv[0]} is not installed.", hint=f"apt-get install {os.path.basename(argv[0])}") from error
    except subprocess.TimeoutExpired as error:
        raise ProcessError(f"`{shlex.join(argv)}` did not finish within {timeout:g} seconds.") from error
    if check and done.returncode != 0:
        raise failure(argv, done.returncode, done.stderr or b"")
    return done


def failure(argv: Sequence[str], returncode: int, output: bytes) -> ProcessError:
    """The error for a program that ended with ``returncode`` after printing ``output``."""
    how = f"was killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"failed with exit code {returncode}"
    tail = "\n".join(output.decode(errors="replace").strip().splitlines()[-5:])
    return ProcessError(f"`{shlex.join(argv)}` {how}" + (f":\n{tail}" if tail else "."))


def spawn(
    command: Sequence[str | os.PathLike[str]],
    *,
    stdin: int | IO[Any] = subprocess.DEVNULL,
    stdout: int | IO[Any] | None = subprocess.DEVNULL,
    stderr: int | IO[Any] | None = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    pass_fds: Sequence[int] = (),
    new_session: bool = True,
    bound: bool = True,
    setup: Callable[[], None] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program and return at once.

    Arguments:
        new_session: its own session, so that Ctrl-C in our terminal does not reach it.
        bound: the kernel kills it (SIGKILL) when the *thread* that started it ends, however that happens.
        setup: called in the child just before exec, for example to enter a network namespace.
    """
    argv = [os.fspath(word) for word in command]
    argv[0] = argv[0] if "/" in argv[0] else find(argv[0])
    die = _die_with_parent(os.getpid())

    def prepare() -> None:
        if setup is not None:
            setup()
        if bound:  # last: changing credentials clears it
            die()

    return subprocess.Popen(
        argv,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=environment(env),
        cwd=cwd,
        pass_fds=pass_fds,
        start_new_session=new_session,
        preexec_fn=prepare if bound or setup else None,
    )


def _die_with_parent(parent: int) -> Callable[[], None]:
    def bind() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before prctl
            os._exit(1)

    return bind
