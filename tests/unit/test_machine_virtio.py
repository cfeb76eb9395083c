"""Virtqueues and the vhost-user protocol, with this test as QEMU and the guest's driver: real memory, real eventfds."""

import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_driver import AVAIL, BUFFERS, DESC, GUEST, INDIRECT, LENGTH, NEXT, SIZE, USED, USER, WRITE, Driver, Qemu

from fcvm.machine import hostfs, vhost_user
from fcvm.machine.vhost_user import Backend, Complete
from fcvm.machine.virtqueue import Chain, Memory, Region, Virtqueue
from fuse_pipe import messages
from fuse_pipe.session import Session


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.close()


def test_chain_of_buffers(driver: Driver) -> None:
    driver.view[BUFFERS : BUFFERS + 6] = b"abcdef"
    driver.descriptor(3, BUFFERS, 4, NEXT, 5)
    driver.descriptor(5, BUFFERS + 4, 2, NEXT, 1)
    driver.descriptor(1, BUFFERS + 0x100, 16, WRITE)
    driver.offer(3)
    queue = driver.queue()
    chain = queue.pop()
    assert chain is not None
    assert (chain.head, b"".join(chain.readable), [len(b) for b in chain.writable]) == (3, b"abcdef", [16])
    assert queue.pop() is None
    chain.writable[0][:3] = b"xyz"
    queue.push(3, 3)
    assert bytes(driver.view[BUFFERS + 0x100 : BUFFERS + 0x103]) == b"xyz"
    assert driver.used() == (1, [(3, 3)])


def test_indirect_table(driver: Driver) -> None:
    driver.view[BUFFERS : BUFFERS + 2] = b"hi"
    driver.descriptor(0, BUFFERS, 2, NEXT, 1, table=0x3000)
    driver.descriptor(1, BUFFERS + 0x10, 8, WRITE, 0, table=0x3000)
    driver.descriptor(2, 0x3000, 32, INDIRECT)
    driver.offer(2)
    chain = driver.queue().pop()
    assert chain is not None
    assert (chain.head, bytes(chain.readable[0]), len(chain.writable[0])) == (2, b"hi", 8)


def test_rings_wrap_around(driver: Driver) -> None:
    queue = driver.queue()
    for number in range(70_000):
        driver.descriptor(number % SIZE, BUFFERS, 1)
        driver.offer(number % SIZE)
        chain = queue.pop()
        assert chain is not None
        assert chain.head == number % SIZE
        queue.push(chain.head, number & 0xFF)
    assert driver.used()[0] == 70_000 & 0xFFFF
    assert queue.index == 70_000 & 0xFFFF


def test_the_driver_sees_no_index_half_written(driver: Driver) -> None:
    """It reads the index of the used ring at any moment; one in between would be entries that nobody has made."""
    index = driver.view[USED + 2 : USED + 4].cast("H")
    least, rounds = 0x101, 5
    index[0] = least
    child = os.fork()
    if child == 0:
        for _ in range(rounds):
            index[0] = least
            queue = driver.queue()
            for _ in range(0xFFFF - least):
                queue.push(0, 0)
        os._exit(0)
    seen = least
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        seen = min(seen, *(index[0] for _ in range(1000)))
    index.release()
    assert seen == least


def test_a_stopped_queue_goes_on_where_it_was(driver: Driver) -> None:
    queue = driver.queue()
    for _ in range(3):
        driver.descriptor(0, BUFFERS, 1)
        driver.offer(0)
        assert queue.pop() is not None
        queue.push(0, 0)
    again = driver.queue(queue.index)
    assert again.pop() is None
    driver.offer(0)
    assert again.pop() is not None
    again.push(0, 7)
    assert driver.used()[0] == 4


@pytest.mark.parametrize(
    ("address", "length"), [(0, 1), (GUEST - 1, 2), (GUEST + LENGTH, 1), (GUEST + LENGTH - 1, 2), (2**63, 1)]
)
def test_buffers_outside_of_memory_are_refused(driver: Driver, address: int, length: int) -> None:
    struct.pack_into("<QIHH", driver.view, DESC, address, length, 0, 0)
    driver.offer(0)
    with pytest.raises(ValueError, match="no guest memory"):
        driver.queue().pop()


def test_descriptors_outside_of_the_table_and_loops_are_refused(driver: Driver) -> None:
    driver.offer(SIZE)
    with pytest.raises(ValueError, match="descriptor 8 of 8"):
        driver.queue().pop()
    driver.descriptor(0, BUFFERS, 1, NEXT, 1)
    driver.descriptor(1, BUFFERS, 1, NEXT, 0)
    driver.offer(0)
    with pytest.raises(ValueError, match="in chain 0"):
        driver.queue(1).pop()


def test_an_indirect_table_cannot_lead_back(driver: Driver) -> None:
    driver.descriptor(0, 0x3000, 16, INDIRECT)
    driver.descriptor(0, 0x3000, 16, INDIRECT, table=0x3000)  # a table that is its own entry
    driver.offer(0)
    with pytest.raises(ValueError, match="in chain 0"):
        driver.queue().pop()


@pytest.mark.parametrize("size", [0, 3, 65536])
def test_sizes_that_are_no_powers_of_two_are_refused(driver: Driver, size: int) -> None:
    with pytest.raises(ValueError, match="entries"):
        Virtqueue(driver.memory, size, USER + DESC, USER + AVAIL, USER + USED, 0)


def test_two_regions_of_one_file() -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 0x4000)
    os.pwrite(fd, b"low", 0)
    os.pwrite(fd, b"high", 0x2000)
    regions: list[Region] = [Memory.map(fd, 0, USER, 0x2000, 0), Memory.map(fd, 1 << 32, USER + 0x2000, 0x2000, 0x2000)]
    os.close(fd)
    memory = Memory(regions)
    assert bytes(memory.at_guest(0, 3)) == b"low"
    assert bytes(memory.at_guest(1 << 32, 4)) == b"high"
    assert bytes(memory.at_user(USER + 0x2000, 4)) == b"high"
    with pytest.raises(ValueError, match="no guest memory"):
        memory.at_guest(0x1FFF, 2)


@pytest.fixture
def connected(driver: Driver) -> Iterator[tuple[Qemu, socket.socket]]:
    ours, theirs = socket.socketpair()
    qemu = Qemu(driver, ours)
    yield qemu, theirs
    qemu.close()
    theirs.close()


def test_requests_are_answered_and_the_end_ends_it(connected: tuple[Qemu, socket.socket]) -> None:
    qemu, theirs = connected
    seen: list[tuple[int, bytes]] = []

    def handle(queue: int, chain: Chain, complete: Complete) -> None:
        seen.append((queue, b"".join(chain.readable)))
        chain.writable[0][:2] = b"ok"
        complete(2)

    thread = threading.Thread(target=Backend(theirs, 2, handle).serve)
    thread.start()
    qemu.set_up(1)
    driver = qemu.driver
    driver.view[BUFFERS : BUFFERS + 4] = b"ping"
    driver.descriptor(0, BUFFERS, 4, NEXT, 1)
    driver.descriptor(1, BUFFERS + 0x100, 8, WRITE)
    for round_ in range(3):
        driver.offer(0)
        os.eventfd_write(qemu.kick, 1)
        qemu.interrupt()
        assert driver.used()[0] == round_ + 1
    assert seen == [(1, b"ping")] * 3
    assert struct.unpack("<II", qemu.send(vhost_user.GET_VRING_BASE, struct.pack("<II", 1, 0), reply=True)) == (1, 3)
    driver.offer(0)
    os.eventfd_write(qemu.kick, 1)
    assert struct.unpack("<Q", qemu.send(vhost_user.GET_QUEUE_NUM, reply=True)) == (2,)
    assert len(seen) == 3, "a stopped queue was served"
    qemu.sock.close()
    thread.join(60)
    assert not thread.is_alive()


def test_a_request_completed_after_a_reset_is_dropped(connected: tuple[Qemu, socket.socket]) -> None:
    qemu, theirs = connected
    pending: list[Complete] = []
    arrived = threading.Event()

    def handle(queue: int, chain: Chain, complete: Complete) -> None:
        pending.append(complete)
        arrived.set()

    thread = threading.Thread(target=Backend(theirs, 1, handle).serve)
    thread.start()
    qemu.set_up(0)
    qemu.driver.descriptor(0, BUFFERS, 4, WRITE)
    qemu.driver.offer(0)
    os.eventfd_write(qemu.kick, 1)
    assert arrived.wait(60)
    qemu.send(vhost_user.GET_VRING_BASE, struct.pack("<II", 0, 0), reply=True)
    pending[0](4)
    assert qemu.driver.used()[0] == 0
    qemu.sock.close()
    thread.join(60)


def fuse(opcode: int, unique: int, node: int, body: bytes = b"") -> bytes:
    return struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, node, os.geteuid(), os.getegid(), 1, 0, 0) + body


def test_host_files_through_the_device(connected: tuple[Qemu, socket.socket], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    qemu, theirs = connected
    thread = threading.Thread(target=hostfs.serve_host, args=(theirs, str(tmp_path)))
    thread.start()
    qemu.set_up(1)
    driver = qemu.driver

    def ask(opcode: int, node: int, body: bytes = b"") -> tuple[int, bytes]:
        request = fuse(opcode, driver.index + 1, node, body)
        driver.view[BUFFERS : BUFFERS + len(request)] = request
        # As the kernel does it: header, arguments; reply header, reply.
        driver.descriptor(0, BUFFERS, 40, NEXT, 1)
        driver.descriptor(1, BUFFERS + 40, max(len(body), 1), NEXT, 2)
        driver.descriptor(2, BUFFERS + 0x8000, 16, WRITE | NEXT, 3)
        driver.descriptor(3, BUFFERS + 0x9000, 0x2000, WRITE)
        driver.offer(0)
        os.eventfd_write(qemu.kick, 1)
        qemu.interrupt()
        length, error, unique = struct.unpack_from("<IiQ", driver.view, BUFFERS + 0x8000)
        assert unique == driver.index
        count, entries = driver.used()
        assert entries[(count - 1) % SIZE] == (0, length)
        return error, bytes(driver.view[BUFFERS + 0x9000 : BUFFERS + 0x9000 + length - 16])

    flags = 0xFFFF_FFFF
    error, answer = ask(messages.INIT, 0, struct.pack("<IIII", 7, 38, 1 << 20, flags) + bytes(48))
    assert (error, struct.unpack_from("<II", answer)) == (0, (7, messages.MINOR))
    error, answer = ask(messages.LOOKUP, 1, b"file\0")
    assert error == 0
    node, _, entry_time, attribute_time = struct.unpack_from("<QQQQ", answer)
    assert (entry_time, attribute_time) == (0, 0), "the machine would believe what the host has changed"
    error, answer = ask(messages.OPEN, node, struct.pack("<II", os.O_RDONLY, 0))
    handle = struct.unpack_from("<Q", answer)[0]
    assert ask(messages.READ, node, struct.pack("<QQIIQII", handle, 0, 4096, 0, 0, 0, 0)) == (0, b"content")
    (tmp_path / "file").write_bytes(b"changed!")
    error, answer = ask(messages.GETATTR, node, bytes(16))
    assert struct.unpack_from("<Q", answer)[0] == 0
    assert struct.unpack_from("<Q", answer, 24)[0] == 8
    assert ask(messages.LOOKUP, 1, b"nothing\0")[0] == -2
    assert ask(messages.FSYNC, node, struct.pack("<QII", handle, 0, 0))[0] == 0  # by another thread
    qemu.sock.close()
    thread.join(60)


def test_a_guest_that_breaks_the_protocol_ends_the_device(connected: tuple[Qemu, socket.socket]) -> None:
    qemu, theirs = connected
    caught: list[BaseException] = []

    def serve() -> None:
        try:
            Backend(theirs, 1, lambda queue, chain, complete: complete(0)).serve()
        except ValueError as error:
            caught.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    qemu.set_up(0)
    qemu.driver.offer(500)
    os.eventfd_write(qemu.kick, 1)
    thread.join(60)
    assert len(caught) == 1


def test_scatter_fills_buffers_in_order() -> None:
    buffers = [memoryview(bytearray(3)), memoryview(bytearray(0)), memoryview(bytearray(4))]
    assert hostfs.scatter([b"ab", b"", b"cdefghij"], buffers) == 7
    assert [bytes(buffer) for buffer in buffers] == [b"abc", b"", b"defg"]


def test_sessions_are_the_volumes_own(tmp_path: Path) -> None:
    session = Session("machine", hostfs.HostVolume(str(tmp_path)))
    assert session.volume.watcher is None
    session.close()
