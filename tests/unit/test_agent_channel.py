"""The framed channel: frames, flow control, and what survives a broken connection."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fc_agent import channel as wire
from fc_agent.channel import Channel, ChannelError


def joined(left: Channel, right: Channel) -> None:
    """A new connection between two ends, as the opening lines would make it."""
    a, b = socket.socketpair()
    left.attach(a, peer_received=right.received)
    right.attach(b, peer_received=left.received)


def exchange(*ends: Channel) -> list[list[tuple[int, bytes]]]:
    """Move bytes until nothing moves any more; returns the frames that each end got."""
    got: list[list[tuple[int, bytes]]] = [[] for _ in ends]
    while True:
        moved = False
        for end in ends:
            end.flush()
        for frames, end in zip(got, ends, strict=True):
            acknowledged = end.acknowledged
            new = end.receive()
            frames += new
            end.consume(end.received)
            moved = moved or bool(new) or end.acknowledged != acknowledged
        if not moved and not any(end.wants_write for end in ends):
            return got


def close(*ends: Channel) -> None:
    for end in ends:
        end.detach()


def test_frames_arrive_in_order_with_their_types() -> None:
    left, right = Channel(), Channel()
    joined(left, right)
    left.send(wire.STDIN, b"one")
    left.send(wire.STDIN_EOF)
    right.send(wire.STDOUT, b"\0" * 200_000)
    assert exchange(left, right) == [[(wire.STDOUT, b"\0" * 200_000)], [(wire.STDIN, b"one"), (wire.STDIN_EOF, b"")]]
    assert left.settled
    assert right.settled
    close(left, right)


def test_a_full_sender_is_released_by_consumption_only() -> None:
    left, right = Channel(), Channel()
    joined(left, right)
    while not left.full:
        left.send(wire.STDOUT, bytes(wire.CHUNK))
    frames = []
    while left.wants_write or not frames:
        left.flush()
        frames += right.receive()
    right.flush()
    assert left.receive() == []
    assert left.full
    right.consume(1)
    right.flush()
    left.receive()
    assert not left.full
    assert left.acknowledged == 1
    close(left, right)


def test_bytes_read_with_the_opening_line_are_not_lost() -> None:
    left, right = Channel(), Channel()
    a, b = socket.socketpair()
    left.attach(a, peer_received=0)
    left.send(wire.STDIN, b"early")
    left.flush()
    rest = b.recv(3)
    right.attach(b, peer_received=0, rest=rest)
    assert right.receive() == [(wire.STDIN, b"early")]
    close(left, right)


def test_the_answer_to_a_line_and_what_follows_it_are_one_write() -> None:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps writes apart
    end = Channel()
    end.send(wire.STARTED, b"{}")
    end.send(wire.STDOUT, b"hello")
    end.attach(a, peer_received=0, line=wire.line({"session": "1"}))
    end.flush()
    written = b.recv(65536)
    assert written == b'{"session":"1"}\n' + wire.HEADER.pack(wire.STARTED, 2) + b"{}" + wire.HEADER.pack(wire.STDOUT, 5) + b"hello"
    b.close()
    end.detach()


@pytest.mark.parametrize(
    "data",
    [
        wire.HEADER.pack(wire.STDOUT, wire.MAX_PAYLOAD + 1),
        wire.HEADER.pack(200, 0),
        wire.HEADER.pack(wire.ACK, 3) + b"abc",
        wire.HEADER.pack(wire.ACK, 8) + wire.COUNT.pack(7),
    ],
)
def test_a_broken_peer_is_noticed(data: bytes) -> None:
    end = Channel()
    a, b = socket.socketpair()
    end.attach(a, peer_received=0)
    b.sendall(data)
    with pytest.raises(ChannelError):
        end.receive()
    b.close()
    end.detach()


def test_a_peer_cannot_have_seen_what_was_not_sent() -> None:
    a, b = socket.socketpair()
    with a, b, pytest.raises(ChannelError):
        Channel().attach(a, peer_received=1)


def test_the_end_of_a_connection_is_a_connection_error() -> None:
    end = Channel()
    a, b = socket.socketpair()
    end.attach(a, peer_received=0)
    b.close()
    with pytest.raises(ConnectionError):
        end.receive()
    end.detach()


@pytest.mark.parametrize("line", [b"[]\n", b"{\n", b"\xff\n", b"[" * 100_000 + b"\n"])
def test_a_bad_opening_line(line: bytes) -> None:
    a, b = socket.socketpair()
    with a, b:
        b.sendall(line)
        with pytest.raises(ChannelError):
            wire.read_line(a)


def test_an_endless_opening_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_LINE", 1000)
    a, b = socket.socketpair()
    with a, b:
        b.sendall(b"x" * 5000)
        with pytest.raises(ChannelError):
            wire.read_line(a)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(0, 1), st.binary(max_size=300)),
        st.tuples(st.just("flush"), st.integers(0, 1), st.none()),
        st.tuples(st.just("receive"), st.integers(0, 1), st.integers(0, 5)),
        st.tuples(st.just("cut"), st.just(0), st.none()),
    ),
    max_size=60,
)


@given(steps)
def test_nothing_is_lost_or_repeated_whenever_the_connection_is_cut(plan: list[tuple[str, int, object]]) -> None:
    ends = (Channel(), Channel())
    sent: tuple[list[bytes], list[bytes]] = ([], [])
    got: tuple[list[bytes], list[bytes]] = ([], [])
    joined(*ends)

    def receive(index: int, lag: int) -> None:
        got[index].extend(payload for _, payload in ends[index].receive())
        ends[index].consume(ends[index].received - lag)

    for action, index, value in plan:
        if action == "send":
            assert isinstance(value, bytes)
            ends[index].send(wire.STDIN, value)
            sent[index].append(value)
        elif action == "flush":
            ends[index].flush()
        elif action == "receive":
            assert isinstance(value, int)
            receive(index, value)
        else:
            joined(*ends)
    while any(end.wants_write or not end.settled for end in ends):
        for index, end in enumerate(ends):
            end.flush()
            receive(index, 0)
    assert got == (sent[1], sent[0])
    close(*ends)
