"""What the relay answers by itself, and when it must not."""

import errno
import os
import socket
from collections.abc import Iterator

import pytest

from fuse_pipe import messages as m
from fuse_pipe import shortcuts
from fuse_pipe.channel import ATTRIBUTES, CONTENT, NOTIFY, QUIET_AT, Channel, relay_channel
from fuse_pipe.shortcuts import Shortcuts

DIRECTORY, FILE, OTHER = 5, 6, 7


class Kernel:
    """Makes the kernel's requests of a relay that is connected."""

    def __init__(self) -> None:
        self.notifications = relay_channel(NOTIFY)
        self.shortcuts = Shortcuts(self.notifications, behind=True)
        self.shortcuts.quiet = True
        self.channel: Channel = relay_channel(0)
        self.channel.sock, self.other = socket.socketpair()
        self.unique = 0
        self.quiet = False

    def ask(self, opcode: int, nodeid: int, /, *tail: bytes, **fields: int) -> bytes | None:
        """The answer that is given at once, if any; ``quiet`` says whether the request goes on all the same."""
        self.unique += 2
        request = bytearray(m.encode_request(opcode, self.unique, nodeid, *tail, **fields))
        size = len(request)
        answer = self.shortcuts.request(self.channel, opcode, self.unique, nodeid, request, size)
        self.quiet = request[QUIET_AT] != 0
        return answer

    def answered(self, *ahead: bytes, error: int = 0, body: bytes = b"", unique: int | None = None) -> bytes:
        """The server's answer to the last request, and what comes ahead of it; what the kernel gets."""
        unique = self.unique if unique is None else unique
        message = memoryview(m.OUT_HEADER.pack(m.OUT_HEADER.size + len(body), error, unique) + body)
        return bytes(self.shortcuts.reply(unique, error, message, list(ahead)))


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    made = Kernel()
    yield made
    if made.channel.sock is not None:
        made.channel.sock.close()
    made.other.close()


def attributes(nodeid: int, mode: int, *, notified: int = 0, valid: int = 600) -> bytes:
    body = notified.to_bytes(8, "little") + m.ATTR_OUT.encode(attr_valid=valid, ino=nodeid, mode=mode)
    return m.OUT_HEADER.pack(m.OUT_HEADER.size + len(body), ATTRIBUTES, nodeid) + body


def content(nodeid: int, handle: int, data: bytes, *, notified: int = 0) -> bytes:
    body = notified.to_bytes(8, "little") + handle.to_bytes(8, "little") + data
    return m.OUT_HEADER.pack(m.OUT_HEADER.size + len(body), CONTENT, nodeid) + body


def error_of(answer: bytes | None) -> int:
    assert answer is not None
    return -int(m.OUT_HEADER.unpack_from(answer)[1])


def write(
    kernel: Kernel, nodeid: int = FILE, flags: int = os.O_WRONLY, offset: int = 0, handle: int = 1
) -> bytes | None:
    return kernel.ask(m.WRITE, nodeid, b"data", fh=handle, offset=offset, size=4, flags=flags)


def test_flush_goes_to_the_server_only_after_a_write_or_lock(kernel: Kernel) -> None:
    assert error_of(kernel.ask(m.FLUSH, FILE, fh=1)) == 0
    write(kernel)
    assert kernel.ask(m.FLUSH, FILE, fh=1) is None
    assert kernel.ask(m.FLUSH, FILE, fh=2) is None  # nobody knows yet whether it is written
    kernel.answered()
    assert error_of(kernel.ask(m.FLUSH, FILE, fh=1)) == 0
    kernel.ask(m.SETLK, FILE, fh=1, owner=1, start=0, end=1, type=1)
    assert kernel.ask(m.FLUSH, FILE, fh=1) is None
    assert kernel.ask(m.FLUSH, FILE, fh=1) is None


def test_what_the_kernel_forgets_is_forgotten(kernel: Kernel) -> None:
    """A database makes, locks and removes files for ever."""
    for nodeid in (FILE, OTHER, 8):
        kernel.ask(m.SETLK, nodeid, fh=1, owner=1, start=0, end=1, type=1)
        write(kernel, nodeid)
    assert kernel.ask(m.FORGET, FILE, nlookup=1) is None
    assert not kernel.quiet
    assert kernel.ask(m.BATCH_FORGET, 0, m.FORGET_ONE.encode(nodeid=OTHER, nlookup=1), m.FORGET_ONE.encode(nodeid=9, nlookup=2), count=2) is None
    assert kernel.shortcuts.locked == set(kernel.shortcuts.written) == {8}


def opened(kernel: Kernel, *ahead: bytes, opcode: int = m.OPEN, handle: int = 1, flags: int = 0) -> None:
    """The file is opened by a request of this kind; ``flags`` are those of the answer."""
    body = m.OPEN_OUT.encode(fh=handle, open_flags=flags)
    if opcode == m.OPEN:
        assert kernel.ask(opcode, FILE, flags=os.O_RDWR) is None
    else:
        assert kernel.ask(opcode, DIRECTORY, b"f", flags=os.O_RDWR, mode=0o100644) is None
        body = m.ENTRY_OUT.encode(nodeid=FILE) + body
    kernel.answered(*ahead, body=body)


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize("opcode", [m.OPEN, m.CREATE, m.TMPFILE])
def test_an_open_file_is_not_forgotten_with_some_of_its_references(kernel: Kernel, opcode: int, quiet: bool) -> None:
    """The kernel gives one back when another name turns out to lead to a file that it knows."""
    opened(kernel, opcode=opcode, handle=1)
    opened(kernel, handle=2)
    kernel.ask(m.OPEN, FILE, flags=os.O_RDWR)
    kernel.answered(error=-errno.EACCES)  # no third
    kernel.ask(m.SETLK, OTHER, fh=1, owner=1, start=0, end=1, type=1)
    write(kernel)
    kernel.shortcuts.failed(FILE, errno.ENOSPC, 2)
    kernel.shortcuts.quiet = quiet
    kernel.ask(m.RELEASE, FILE, fh=2)
    kernel.ask(m.BATCH_FORGET, 0, *(m.FORGET_ONE.encode(nodeid=node, nlookup=1) for node in (FILE, OTHER)), count=2)
    assert not kernel.shortcuts.locked  # of a file that nobody has open
    assert kernel.ask(m.FLUSH, FILE, fh=1) is None
    assert error_of(kernel.answered()) == errno.ENOSPC
    kernel.ask(m.SETLK, FILE, fh=1, owner=1, start=0, end=1, type=1)
    kernel.ask(m.FORGET, FILE, nlookup=1)
    assert kernel.ask(m.FLUSH, FILE, fh=1) is None
    kernel.ask(m.RELEASE, FILE, fh=1)
    kernel.ask(m.FORGET, FILE, nlookup=1)
    assert error_of(kernel.ask(m.FLUSH, FILE, fh=2)) == 0


def test_release_is_answered_and_passed_on(kernel: Kernel) -> None:
    assert error_of(kernel.ask(m.RELEASE, FILE, fh=1)) == 0
    assert kernel.quiet
    kernel.shortcuts.quiet = False  # a server that does not know of it
    assert kernel.ask(m.RELEASE, FILE, fh=1) is None
    assert not kernel.quiet


def test_write_is_answered_and_passed_on(kernel: Kernel) -> None:
    answer = write(kernel)
    assert answer is not None
    assert m.decode_reply(m.WRITE, answer)[2][0].size == 4
    assert kernel.quiet


@pytest.mark.parametrize("flags", [os.O_SYNC, os.O_DSYNC, os.O_DIRECT])
def test_synchronous_writes_wait(kernel: Kernel, flags: int) -> None:
    assert write(kernel, flags=os.O_RDWR | flags) is None
    assert not kernel.quiet


def test_writes_to_files_of_the_hosts_kernel_wait(kernel: Kernel) -> None:
    """Whether what was written makes sense is for the answer to say."""
    opened(kernel, handle=1, flags=m.FOPEN_DIRECT_IO)
    assert write(kernel) is None
    assert not kernel.quiet
    assert write(kernel, OTHER, handle=2) is not None
    kernel.ask(m.RELEASE, FILE, fh=1)
    assert write(kernel) is not None  # nothing is kept of what was closed


def test_writes_wait_beyond_what_may_be_under_way(kernel: Kernel) -> None:
    kernel.channel.kept = shortcuts.BEHIND_MOST + 1
    assert write(kernel) is None


def test_writes_wait_without_a_connection(kernel: Kernel) -> None:
    assert kernel.channel.sock is not None
    kernel.channel.sock.close()
    kernel.channel.sock = None
    assert write(kernel) is None


def test_writes_wait_at_offsets_that_the_host_may_not_have(kernel: Kernel) -> None:
    assert write(kernel, offset=1 << 43) is None


def test_writes_wait_where_channels_could_overtake_one_another(kernel: Kernel) -> None:
    kernel.shortcuts = Shortcuts(kernel.notifications, behind=False)
    kernel.shortcuts.quiet = True
    assert write(kernel) is None


def test_a_failed_write_fails_the_next_write_once(kernel: Kernel) -> None:
    write(kernel)
    kernel.shortcuts.failed(FILE, errno.ENOSPC, 1)
    assert error_of(write(kernel)) == errno.ENOSPC
    assert not kernel.quiet
    assert write(kernel) is None  # and from now on writes wait


@pytest.mark.parametrize("opcode", [m.FLUSH, m.FSYNC])
def test_a_failed_write_fails_close_and_fsync(kernel: Kernel, opcode: int) -> None:
    write(kernel)
    assert kernel.ask(opcode, FILE, fh=1) is None
    kernel.shortcuts.failed(FILE, errno.EDQUOT, 1)
    assert error_of(kernel.answered()) == errno.EDQUOT


def test_a_failed_write_is_told_once_to_each_who_had_the_file_open(kernel: Kernel) -> None:
    """A reader that closes the file does not take the error away from the writer."""

    def told(opcode: int, handle: int) -> int:
        answer = kernel.ask(opcode, FILE, fh=handle)
        return error_of(answer) if answer is not None else error_of(kernel.answered())

    write(kernel)
    kernel.shortcuts.failed(FILE, errno.ENOSPC, 3)
    assert told(m.FLUSH, 2) == errno.ENOSPC
    assert told(m.FSYNC, 1) == errno.ENOSPC
    assert told(m.FLUSH, 1) == told(m.FSYNC, 1) == 0
    assert told(m.FLUSH, 4) == 0  # opened later
    assert told(m.FLUSH, 3) == errno.ENOSPC


@pytest.mark.parametrize("opcode", [m.COPY_FILE_RANGE, m.COPY_FILE_RANGE_64])
def test_what_was_copied_into_a_file_is_settled_when_it_is_closed(kernel: Kernel, opcode: int) -> None:
    """A network file system of the host says only then that there was no room."""
    assert kernel.ask(opcode, OTHER, fh_in=2, nodeid_out=FILE, fh_out=1, len=4096) is None
    assert error_of(kernel.ask(m.FLUSH, OTHER, fh=2)) == 0
    assert kernel.ask(m.FLUSH, FILE, fh=1) is None
    kernel.answered()
    assert error_of(kernel.ask(m.FLUSH, FILE, fh=1)) == 0


def test_a_write_beside_the_close_of_another_is_not_settled_by_it(kernel: Kernel) -> None:
    write(kernel)
    kernel.ask(m.FLUSH, FILE, fh=2)
    write(kernel)
    kernel.answered(unique=kernel.unique - 2)
    assert kernel.ask(m.FLUSH, FILE, fh=1) is None


def test_a_failed_write_is_no_matter_of_other_files(kernel: Kernel) -> None:
    kernel.shortcuts.failed(FILE, errno.ENOSPC, 2)
    assert write(kernel, OTHER) is None
    assert kernel.ask(m.FSYNC, OTHER, fh=2) is None
    assert error_of(kernel.answered()) == 0


def test_a_new_file_has_no_capabilities_until_some_are_set(kernel: Kernel) -> None:
    kernel.ask(m.CREATE, DIRECTORY, b"f", flags=os.O_WRONLY, mode=0o100644)
    kernel.answered(body=m.ENTRY_OUT.encode(nodeid=FILE) + m.OPEN_OUT.encode(fh=1))
    assert error_of(kernel.ask(m.GETXATTR, FILE, b"security.capability", size=0)) == errno.ENODATA
    assert error_of(kernel.ask(m.GETXATTR, FILE, b"security.capability", size=0)) == errno.ENODATA
    assert kernel.ask(m.GETXATTR, FILE, b"user.a", size=0) is None
    assert kernel.ask(m.GETXATTR, OTHER, b"security.capability", size=0) is None
    kernel.ask(m.SETXATTR, FILE, b"security.capability", b"", size=0)
    assert kernel.ask(m.GETXATTR, FILE, b"security.capability", size=0) is None


def test_attributes_sent_ahead_are_given_once(kernel: Kernel) -> None:
    kernel.ask(m.UNLINK, DIRECTORY, b"f")
    kernel.answered(attributes(DIRECTORY, 0o040755))
    answer = kernel.ask(m.GETATTR, DIRECTORY)
    assert answer is not None
    assert m.decode_reply(m.GETATTR, answer)[2][0].ino == DIRECTORY
    assert kernel.ask(m.GETATTR, DIRECTORY) is None


@pytest.mark.parametrize(
    ("opcode", "nodeid", "tail", "held"),
    [
        (m.CREATE, DIRECTORY, (b"g",), False),
        (m.UNLINK, DIRECTORY, (b"g",), False),
        (m.UNLINK, OTHER, (b"g",), True),
        (m.RMDIR, OTHER, (b"g",), False),
        (m.RENAME, OTHER, (b"g", b"h"), False),
        (m.SETATTR, DIRECTORY, (), False),
        (m.SETATTR, OTHER, (), True),
        (m.SETXATTR, DIRECTORY, (b"user.a", b""), False),
        (m.READDIR, DIRECTORY, (), False),
    ],
)
def test_attributes_of_a_directory_hold_until_it_changes(
    kernel: Kernel, opcode: int, nodeid: int, tail: tuple[bytes, ...], held: bool
) -> None:
    kernel.ask(m.UNLINK, DIRECTORY, b"f")
    kernel.answered(attributes(DIRECTORY, 0o040755))
    kernel.ask(opcode, nodeid, *tail)
    assert (kernel.ask(m.GETATTR, DIRECTORY) is not None) == held


@pytest.mark.parametrize(
    ("opcode", "nodeid", "tail", "held"),
    [
        (m.WRITE, FILE, (b"",), False),
        (m.WRITE, OTHER, (b"",), True),
        (m.UNLINK, DIRECTORY, (b"g",), False),
        (m.LINK, DIRECTORY, (b"g",), False),
        (m.CREATE, DIRECTORY, (b"g",), True),
        (m.COPY_FILE_RANGE, OTHER, (), False),
        (m.READ, FILE, (), False),
    ],
)
def test_attributes_of_a_file_hold_until_it_may_have_changed(
    kernel: Kernel, opcode: int, nodeid: int, tail: tuple[bytes, ...], held: bool
) -> None:
    write(kernel)
    kernel.ask(m.FLUSH, FILE, fh=1)
    kernel.answered(attributes(FILE, 0o100644))
    kernel.ask(opcode, nodeid, *tail)
    assert (kernel.ask(m.GETATTR, FILE) is not None) == held


def test_attributes_that_a_later_request_overtook_are_not_believed(kernel: Kernel) -> None:
    kernel.ask(m.UNLINK, DIRECTORY, b"f")
    first = kernel.unique
    kernel.ask(m.UNLINK, DIRECTORY, b"g")
    kernel.answered(attributes(DIRECTORY, 0o040755), unique=first)
    assert kernel.ask(m.GETATTR, DIRECTORY) is None


def test_what_was_sent_ahead_is_forgotten_at_a_notification(kernel: Kernel) -> None:
    kernel.ask(m.UNLINK, DIRECTORY, b"f")
    kernel.answered(attributes(DIRECTORY, 0o040755))
    kernel.shortcuts.notified(OTHER)
    assert kernel.ask(m.GETATTR, DIRECTORY) is None


def test_what_was_sent_before_a_notification_that_came_is_not_believed(kernel: Kernel) -> None:
    kernel.notifications.count(40)
    kernel.ask(m.UNLINK, DIRECTORY, b"f")
    kernel.answered(attributes(DIRECTORY, 0o040755, notified=0))
    assert kernel.ask(m.GETATTR, DIRECTORY) is None
    kernel.ask(m.UNLINK, DIRECTORY, b"f")
    kernel.answered(attributes(DIRECTORY, 0o040755, notified=1))
    assert kernel.ask(m.GETATTR, DIRECTORY) is not None


def test_attributes_are_believed_no_longer_than_the_kernel_may(kernel: Kernel) -> None:
    kernel.ask(m.UNLINK, DIRECTORY, b"f")
    kernel.answered(attributes(DIRECTORY, 0o040755, valid=0))
    assert kernel.ask(m.GETATTR, DIRECTORY) is None


def test_a_small_file_is_read_without_asking_once(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcuts, "FRESH_CONTENT", 60.0)
    opened(kernel, content(FILE, 9, b"content"), handle=9)
    assert kernel.ask(m.READ, FILE, fh=8, offset=0, size=4096) is None
    assert kernel.ask(m.READ, FILE, fh=9, offset=4096, size=4096) is None
    assert kernel.ask(m.READ, FILE, fh=9, offset=0, size=4) is None
    answer = kernel.ask(m.READ, FILE, fh=9, offset=0, size=4096)
    assert answer is not None
    assert m.decode_reply(m.READ, answer)[3] == b"content"
    assert kernel.quiet  # reading changes the access time
    assert kernel.ask(m.READ, FILE, fh=9, offset=0, size=4096) is None


@pytest.mark.parametrize("opcode", [m.WRITE, m.SETATTR, m.FALLOCATE, m.SETLK, m.SETLKW, m.COPY_FILE_RANGE, m.RELEASE])
def test_a_small_file_is_read_anew_after_a_change_or_lock(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, opcode: int
) -> None:
    monkeypatch.setattr(shortcuts, "FRESH_CONTENT", 60.0)
    opened(kernel, content(FILE, 9, b"content"), handle=9)
    kernel.ask(opcode, FILE, *((b"",) if opcode == m.WRITE else ()), **({"fh": 9} if opcode == m.RELEASE else {}))
    assert kernel.ask(m.READ, FILE, fh=9, offset=0, size=4096) is None


def test_a_small_file_is_read_anew_after_a_while(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcuts, "FRESH_CONTENT", 0.0)
    opened(kernel, content(FILE, 9, b"content"), handle=9)
    assert kernel.ask(m.READ, FILE, fh=9, offset=0, size=4096) is None


def test_what_is_remembered_is_bounded(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcuts, "REMEMBERED", 8)
    monkeypatch.setattr(shortcuts, "CONTENTS", 8)
    for node in range(100, 200):
        kernel.ask(m.UNLINK, node, b"f")
        kernel.answered(attributes(node, 0o040755))
        kernel.ask(m.OPEN, node, flags=os.O_RDONLY)
        kernel.answered(content(node, node, b""), body=m.OPEN_OUT.encode(fh=node))
        write(kernel, node)
        kernel.ask(m.FLUSH, node, fh=1)
        kernel.shortcuts.failed(node, errno.EIO, 1)
        kernel.answered()
    assert not kernel.shortcuts.asked
    for held in ("_attributes", "_contents", "_changed", "_failed", "_settled"):
        assert len(getattr(kernel.shortcuts, held)) <= 8
