"""What the guest sends over vsock goes in pieces that Firecracker passes on whole; here over a socket that keeps their bounds."""

import socket
from collections.abc import Iterator

import pytest

from fc_agent import vsock
from fc_agent.channel import STDOUT, Channel

EIGHT_PAGES = 8 * 4096  # what Linux sends as one buffer, headers included


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """An end of ours, and one of the host whose every ``recv`` is what one ``send`` has sent."""
    ours, hosts = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with vsock.Socket(fileno=ours.detach()) as ours, hosts:
        hosts.settimeout(30)
        yield ours, hosts


def pieces(hosts: socket.socket) -> list[bytes]:
    """What has arrived, as it was sent."""
    return list(iter(lambda: hosts.recv(1 << 20), b""))


def test_much_is_sent_in_short_pieces(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, hosts = ends
    data = bytes(range(256)) * 400
    ours.sendall(memoryview(data))
    assert ours.send(data) < EIGHT_PAGES
    ours.close()
    found = pieces(hosts)
    assert max(map(len, found)) < EIGHT_PAGES - 512
    assert b"".join(found[:-1]) == data
    assert data.startswith(found[-1])


def test_the_frames_of_a_session_too(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, hosts = ends
    channel = Channel()
    channel.attach(ours, peer_received=0)
    channel.send(STDOUT, bytes(100_000))
    channel.flush()
    channel.detach()
    found = pieces(hosts)
    assert max(map(len, found)) < EIGHT_PAGES - 512
    assert len(b"".join(found)) > 100_000


def test_accepted_connections_too() -> None:
    with vsock.Socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("")  # Linux makes up a name
        listener.listen()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(listener.getsockname())
            connection, _ = listener.accept()
            with connection:
                assert isinstance(connection, vsock.Socket)
                assert connection.gettimeout() is None
                connection.sendall(b"hello")
                assert client.recv(10) == b"hello"
