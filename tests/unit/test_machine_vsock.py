"""The virtio-vsock device, with this test as the guest's kernel: real queues, real Unix sockets."""

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from machine_driver import BUFFERS, SIZE, WRITE, Driver, Qemu

from fcvm.linux import sockets
from fcvm.machine import vsock
from fcvm.machine.vsock import OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW, OP_SHUTDOWN, Vsock

PORT = 1024
HEADER = struct.Struct("<QQIIIHHIII")
ROOM = 4096  # of a receive buffer, header included, as Linux posts them


@dataclass
class Packet:
    source: int
    operation: int
    flags: int
    taken: int
    data: bytes


class Guest:
    """A kernel's driver with ``buffers`` receive buffers out, and credit of ``credit`` bytes for the host."""

    def __init__(self, driver: Driver, sock: socket.socket, buffers: int = SIZE, credit: int = 1 << 18) -> None:
        self.rx, self.tx = Driver(driver), driver
        self.rx_qemu, self.qemu = Qemu(self.rx, sock), Qemu(driver, sock)
        self.seen = 0
        self.credit = credit
        self.taken: dict[int, int] = {}
        self.rx_qemu.set_up(vsock.RX)
        self.qemu.set_up(vsock.TX)
        for number in range(buffers):
            self.give(number)

    def give(self, number: int) -> None:
        """Offer receive buffer ``number``."""
        self.rx.descriptor(number, BUFFERS + number * ROOM, ROOM, WRITE)
        self.rx.offer(number)
        os.eventfd_write(self.rx_qemu.kick, 1)

    def receive(self, *, give_back: bool = True) -> Packet:
        """The next packet from the host."""
        while self.rx.used()[0] == self.seen & 0xFFFF:
            self.rx_qemu.interrupt()
        number, length = struct.unpack_from("<II", self.rx.view, 0x2000 + 4 + 8 * (self.seen % SIZE))
        self.seen += 1
        packet = bytes(self.rx.view[BUFFERS + number * ROOM :][:length])
        source_cid, cid, source, port, size, kind, operation, flags, _, taken = HEADER.unpack_from(packet)
        assert (source_cid, cid, kind, size) == (2, 3, 1, length - HEADER.size)
        assert port == PORT or operation == OP_RST
        if give_back:
            self.give(number)
        return Packet(source, operation, flags, taken, packet[HEADER.size :])

    def send(self, port: int, operation: int, data: bytes = b"", flags: int = 0, source: int = PORT) -> None:
        """Send a packet and wait until the device has taken it."""
        taken = self.taken.get(port, 0)
        header = HEADER.pack(3, 2, source, port, len(data), 1, operation, flags, self.credit, taken & 0xFFFFFFFF)
        self.tx.view[BUFFERS : BUFFERS + HEADER.size + len(data)] = header + data
        self.tx.descriptor(0, BUFFERS, HEADER.size + len(data))
        before = self.tx.used()[0]
        self.tx.offer(0)
        os.eventfd_write(self.qemu.kick, 1)
        while self.tx.used()[0] == before:
            self.qemu.interrupt()

    def quiet(self, port: int) -> bool:
        """Whether the device has sent nothing more, although it has looked at everything twice since."""
        for _ in range(2):
            self.send(port, OP_CREDIT_UPDATE)
        return bool(self.rx.used()[0] == self.seen & 0xFFFF)

    def accept(self) -> int:
        """Take a connection; returns the host's port."""
        packet = self.receive()
        assert packet.operation == OP_REQUEST
        self.send(packet.source, OP_RESPONSE)
        return packet.source

    def close(self) -> None:
        for qemu in (self.qemu, self.rx_qemu):
            os.close(qemu.kick)
            os.close(qemu.call)
        self.qemu.sock.close()
        self.rx.close()
        self.tx.close()


class World:
    def __init__(self, directory: Path) -> None:
        self.path = directory / "s"
        self.ours, theirs = socket.socketpair()
        self.device = Vsock(theirs, sockets.listen(self.path), PORT)
        self.theirs = theirs
        self.thread = threading.Thread(target=self.device.serve)
        self.thread.start()
        self.guest: Guest | None = None

    def boot(self, **options: int) -> Guest:
        self.guest = Guest(Driver(), self.ours, **options)
        return self.guest

    def connect(self) -> socket.socket:
        return sockets.connect(self.path, timeout=60)

    def close(self) -> None:
        if self.guest is not None:
            self.guest.close()
        self.ours.close()
        self.thread.join(60)
        self.theirs.close()
        assert not self.thread.is_alive()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def test_bytes_go_both_ways(world: World) -> None:
    guest = world.boot()
    with world.connect() as client:
        port = guest.accept()
        client.sendall(b"question")
        packet = guest.receive()
        assert (packet.source, packet.operation, packet.data) == (port, OP_RW, b"question")
        guest.send(port, OP_RW, b"answer")
        assert client.recv(100) == b"answer"


def test_what_a_client_sends_before_the_guest_has_answered_waits(world: World) -> None:
    guest = world.boot()
    with world.connect() as client:
        client.sendall(b"early")
        port = guest.accept()
        packet = guest.receive()
        assert (packet.source, packet.data) == (port, b"early")


def test_refused_by_the_guest(world: World) -> None:
    guest = world.boot()
    with world.connect() as client:
        packet = guest.receive()
        guest.send(packet.source, OP_RST)
        assert client.recv(100) == b""


def test_client_that_leaves(world: World) -> None:
    guest = world.boot()
    client = world.connect()
    port = guest.accept()
    client.sendall(b"last words")
    client.close()
    assert guest.receive().data == b"last words"
    packet = guest.receive()
    assert (packet.operation, packet.flags) == (OP_SHUTDOWN, 3)
    guest.send(port, OP_SHUTDOWN, flags=3)
    assert guest.receive().operation == OP_RST


def test_guest_that_leaves_is_answered_and_nothing_is_lost(world: World) -> None:
    guest = world.boot()
    with world.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        port = guest.accept()
        block = os.urandom(50_000)
        for _ in range(10):  # more than the local socket takes
            guest.send(port, OP_RW, block)
        guest.send(port, OP_SHUTDOWN, flags=3)
        while (packet := guest.receive()).operation != OP_RST:
            assert packet.operation == OP_CREDIT_UPDATE
        with client.makefile("rb") as stream:
            assert stream.read() == block * 10


def test_guest_is_not_sent_more_than_it_has_room_for(world: World) -> None:
    guest = world.boot(credit=10_000)
    with world.connect() as client:
        port = guest.accept()
        data = os.urandom(25_000)
        client.sendall(data)
        got = b""
        while len(got) < 10_000:
            got += guest.receive().data
        assert len(got) == 10_000
        assert guest.quiet(port), "more was sent than there is room for"
        guest.taken[port] = 10_000
        guest.send(port, OP_CREDIT_UPDATE)
        while len(got) < 20_000:
            got += guest.receive().data
        guest.taken[port] = 20_000
        guest.send(port, OP_CREDIT_UPDATE)
        while len(got) < 25_000:
            got += guest.receive().data
        assert got == data


def test_without_buffers_nothing_is_sent_and_nothing_lost(world: World) -> None:
    guest = world.boot(buffers=2)
    with world.connect() as client:
        request = guest.receive(give_back=False)
        guest.send(request.source, OP_RESPONSE)
        data = os.urandom(20_000)
        client.sendall(data)
        got = guest.receive(give_back=False).data
        assert guest.quiet(request.source)
        number = 0
        while len(got) < len(data):
            guest.give(number)
            number = (number + 1) % 2
            got += guest.receive(give_back=False).data
        assert got == data


def test_slow_client_holds_the_guest_back_and_is_accounted_for(world: World) -> None:
    guest = world.boot()
    with world.connect() as client:
        port = guest.accept()
        sent = 0
        block = bytes(60_000)
        while sent < vsock.BUFFER:  # the guest keeps to its credit, which nobody renews as nobody reads
            guest.send(port, OP_RW, block[: vsock.BUFFER - sent])
            sent += len(block[: vsock.BUFFER - sent])
        received = 0
        taken = 0
        while received < sent:
            received += len(client.recv(1 << 20))
        while taken < sent - vsock.UPDATE_AFTER:
            packet = guest.receive()
            assert packet.operation == OP_CREDIT_UPDATE
            taken = packet.taken
        assert taken <= sent


def test_client_killed_while_the_guest_takes_nothing_is_noticed(world: World) -> None:
    guest = world.boot(credit=0)
    client = world.connect()
    guest.accept()
    client.sendall(b"never taken")
    client.close()
    assert guest.receive().operation == OP_RST


def test_client_gone_while_the_guest_sends(world: World) -> None:
    guest = world.boot()
    client = world.connect()
    port = guest.accept()
    client.shutdown(socket.SHUT_RD)
    guest.send(port, OP_RW, b"for nobody")
    assert guest.receive().operation == OP_RST
    client.close()


def test_many_connections(world: World) -> None:
    guest = world.boot()
    clients = [world.connect() for _ in range(50)]
    ports = [guest.accept() for _ in clients]
    assert len(set(ports)) == 50
    for number, port in enumerate(ports):
        guest.send(port, OP_RW, b"%d" % number)
    assert sorted(int(client.recv(10)) for client in clients) == list(range(50))
    for client in clients:
        client.close()


def test_connections_from_the_guest_are_refused(world: World) -> None:
    guest = world.boot()
    guest.send(9999, OP_REQUEST, source=5000)
    packet = guest.receive()
    assert packet.operation == OP_RST
    assert packet.source == 9999


def test_packets_for_connections_that_are_over_are_answered_with_a_reset(world: World) -> None:
    guest = world.boot()
    guest.send(12345, OP_RW, b"late")
    assert guest.receive().operation == OP_RST


def test_connecting_before_the_guest_is_up_waits_for_it(world: World) -> None:
    with world.connect() as client:
        client.sendall(b"early bird")
        guest = world.boot()
        guest.accept()
        assert guest.receive().data == b"early bird"


def test_a_reset_device_ends_its_connections(world: World) -> None:
    guest = world.boot()
    with world.connect() as client:
        guest.accept()
        guest.rx_qemu.send(11, struct.pack("<II", vsock.RX, 0), reply=True)  # GET_VRING_BASE
        assert client.recv(10) == b""


def test_without_descriptors_clients_wait_and_the_device_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = world.boot()
    left = 3
    accept = socket.socket.accept

    def none_left(self: socket.socket) -> object:
        nonlocal left
        if left:
            left -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", none_left)
    with world.connect():
        guest.accept()
