"""fcvm.firecracker.api with a server that answers when it is told to."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fcvm.errors import FirecrackerError
from fcvm.firecracker.api import Api
from fcvm.linux import sockets


class Vmm:
    """Answers every request with its path; one for ``/slow`` only once ``go`` is set. One at a time, as Firecracker."""

    def __init__(self, path: Path) -> None:
        self.listener = sockets.listen(path)
        self.go = threading.Event()
        self.working = threading.Lock()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                path = data.split()[1]
                with self.working:
                    if path == b"/slow":
                        self.go.wait(60)
                    body = b'{"path": "%s"}' % path
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


@pytest.fixture
def vmm(tmp_path: Path) -> Iterator[Vmm]:
    made = Vmm(tmp_path / "api.sock")
    yield made
    made.go.set()
    made.listener.close()


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_ones(vmm: Vmm, tmp_path: Path) -> None:
    with contextlib.closing(Api(tmp_path / "api.sock", timeout=0.1)) as api:
        with pytest.raises(FirecrackerError, match=r"did not answer GET /slow within 0\.1 seconds"):
            api.get("/slow")
        vmm.go.set()
        api.timeout = 60
        api.socket.settimeout(api.timeout)
        assert [api.get(path) for path in ("/a", "/b")] == [{"path": "/a"}, {"path": "/b"}]


def test_one_call_may_take_longer_than_others(vmm: Vmm, tmp_path: Path) -> None:
    with contextlib.closing(Api(tmp_path / "api.sock", timeout=0.1)) as api:
        threading.Timer(0.3, vmm.go.set).start()
        assert api.put("/slow", {}, timeout=60.0) == {"path": "/slow"}
        assert api.socket.gettimeout() == 0.1


def test_a_vmm_that_has_gone_meanwhile_is_an_error(vmm: Vmm, tmp_path: Path) -> None:
    with contextlib.closing(Api(tmp_path / "api.sock", timeout=0.1)) as api:
        (tmp_path / "api.sock").unlink()
        for _ in range(2):
            with pytest.raises(FirecrackerError):
                api.get("/slow")
