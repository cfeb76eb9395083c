"""Every message both ways: encoded, decoded again, and refused when a byte is missing or one too many."""

import os
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuse_pipe import messages as m
from fuse_pipe.errors import ProtocolError

HEADER = Path("/usr/include/linux/fuse.h")
LAYOUTS = [value for value in vars(m).values() if isinstance(value, m.Layout)]
TAILS = {
    "": (),
    "name": (b"name",),
    "names": (b"old", b"new"),
    "data": (b"12345",),
    "value": (b"user.x", b"12345"),
    "records": None,
}


def build(opcode: int) -> tuple[bytes, dict[str, int]]:
    """A message with a different number in every field."""
    request = m.REQUESTS[opcode]
    fields = {}
    if request.layout is not None:
        fields = {name: n + 1 for n, name in enumerate(request.layout.fields)}
        for size in ("size", "in_size"):
            if size in fields and request.tail in ("data", "value"):
                fields[size] = 5
        if request.tail == "records":
            fields["count"] = 3
    tail = TAILS[request.tail]
    if tail is None:
        assert request.record
        tail = (b"".join(request.record.pack(n, n + 1) for n in range(3)),)
    return m.encode_request(opcode, 42, 7, *tail, caller=(1, 2, 3), **fields), fields


@pytest.mark.parametrize("opcode", m.REQUESTS, ids=lambda opcode: m.REQUESTS[opcode].name)
def test_request_both_ways(opcode: int) -> None:
    request = m.REQUESTS[opcode]
    data, fields = build(opcode)
    header = m.IN_HEADER.decode(data[: m.IN_HEADER.size])
    assert header == (len(data), opcode, 42, 7, 1, 2, 3, 0, 0)
    decoded = m.decoders()[opcode](memoryview(data)[m.IN_HEADER.size :])
    count = 5 if opcode == m.INIT else len(fields)
    assert decoded[:count] == tuple(fields.values())[:count]
    rest = decoded[count:]
    if request.tail == "records":
        assert rest == ([(0, 1), (1, 2), (2, 3)],)
    else:
        assert tuple(bytes(part) for part in rest) == TAILS[request.tail]


@pytest.mark.parametrize("opcode", m.REQUESTS, ids=lambda opcode: m.REQUESTS[opcode].name)
def test_request_of_every_wrong_length_is_refused(opcode: int) -> None:
    data, _ = build(opcode)
    body = data[m.IN_HEADER.size :]
    decode = m.decoders()[opcode]
    right = {len(body)} | ({m.INIT_IN_COMPAT.size} if opcode == m.INIT else set())
    for size in range(len(body) + 9):
        if size not in right:
            with pytest.raises(ProtocolError):
                decode(memoryview((body + bytes(9))[:size]))


@pytest.mark.parametrize("opcode", m.REPLIES, ids=lambda opcode: m.REQUESTS[opcode].name)
def test_reply_both_ways(opcode: int) -> None:
    layouts = m.REPLIES[opcode]
    structures = [tuple(n + 1 for n in range(len(layout.fields))) for layout in layouts]
    body = b"".join(layout.pack(*values) for layout, values in zip(layouts, structures, strict=True))
    data = m.OUT_HEADER.pack(m.OUT_HEADER.size + len(body), 0, 9) + body
    assert m.decode_reply(opcode, data) == (9, 0, tuple(structures), b"")
    for wrong in (data[:-1], data + b"x", data[:10]):
        with pytest.raises(ProtocolError):
            m.decode_reply(opcode, wrong)


def test_error_reply() -> None:
    assert m.decode_reply(m.LOOKUP, m.OUT_HEADER.pack(16, -2, 9)) == (9, 2, (), b"")
    with pytest.raises(ProtocolError, match="data"):
        m.decode_reply(m.LOOKUP, m.OUT_HEADER.pack(17, -2, 9) + b"x")


@pytest.mark.parametrize("code", m.NOTIFICATIONS)
def test_notification(code: int) -> None:
    layout = m.NOTIFICATIONS[code]
    values = tuple(range(1, len(layout.fields) + 1))
    data = m.notification(code, *values, tail=b"name\0")
    assert m.OUT_HEADER.unpack_from(data) == (len(data), code, 0)
    assert layout.unpack_from(data, m.OUT_HEADER.size) == values


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layout_has_no_hidden_padding_and_a_known_version(layout: m.Layout) -> None:
    assert layout.size == sum(struct.calcsize("<" + letter) for letter in layout.struct.format[1:])
    assert layout.since in m.KERNELS
    with pytest.raises(TypeError, match="no field"):
        layout.encode(no_such_field=1)


def test_header_of_this_host_agrees() -> None:
    """The installed linux/fuse.h, where there is one, has the same opcodes, flags and field names."""
    if not HEADER.exists():
        return
    text = HEADER.read_text()
    block = re.search(r"enum fuse_opcode \{(.*?)\}", text, re.DOTALL)
    assert block
    for name, number in re.findall(r"\bFUSE_(\w+)\s*=\s*(\d+)", block[1]):
        if "RESERVED" not in name:
            assert m.REQUESTS[int(number)].name == name
    for name, bit in re.findall(r"#define FUSE_(\w+)\s+\(1(?:ULL)? << (\d+)\)", text):
        if hasattr(m, name) and name not in ("FSYNC_FDATASYNC",):
            assert getattr(m, name) == 1 << int(bit), name
    for layout in LAYOUTS:
        found = re.search("struct fuse_" + layout.name + r" \{(.*?)\}", text, re.DOTALL)
        if found and "struct" not in found[1]:
            fields = re.findall(r"(\w+)(?:\[\w+\])?;", found[1])
            named = [
                field for field in fields if field not in ("unused", "spare", "open_flags", "padding", "backing_id")
            ]
            assert [field for field in layout.fields if field in named] == [
                field for field in named if field in layout.fields
            ]


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/"])
def test_names_that_lead_elsewhere_are_refused(name: bytes) -> None:
    decode = m.decoders()
    for opcode in (m.LOOKUP, m.UNLINK, m.MKDIR, m.CREATE, m.LINK):
        data = m.encode_request(opcode, 1, 1, name)
        with pytest.raises(ProtocolError):
            decode[opcode](memoryview(data)[m.IN_HEADER.size :])
    for pair in ((name, b"ok"), (b"ok", name)):
        data = m.encode_request(m.RENAME2, 1, 1, *pair)
        with pytest.raises(ProtocolError):
            decode[m.RENAME2](memoryview(data)[m.IN_HEADER.size :])


def test_symlink_target_may_be_any_path() -> None:
    data = m.encode_request(m.SYMLINK, 1, 1, b"name", b"../../etc/passwd")
    assert m.decoders()[m.SYMLINK](memoryview(data)[m.IN_HEADER.size :]) == (b"name", b"../../etc/passwd")


def test_setxattr_before_its_extension() -> None:
    body = m.SETXATTR_IN_COMPAT.encode(size=3, flags=1) + b"user.x\0abc"
    assert m.decoders(setxattr_ext=False)[m.SETXATTR](memoryview(body)) == (3, 1, 0, 0, b"user.x", b"abc")


def test_groups_extension() -> None:
    group = struct.pack("<IIII", 16, m.EXT_GROUPS, 1, 1234)
    other = struct.pack("<IIQ", 16, 3, 0)
    assert m.decode_groups(memoryview(other + group)) == (1234,)
    for wrong in (
        group[:-1],
        struct.pack("<II", 4, 32),
        struct.pack("<IIII", 16, 32, 2, 1),
        struct.pack("<IIQ", 24, 32, 0),
        b"123",
    ):
        with pytest.raises(ProtocolError):
            m.decode_groups(memoryview(wrong))


@settings(deadline=None)
@given(st.sampled_from(sorted(m.REQUESTS)), st.binary(max_size=200))
def test_any_body_decodes_or_is_refused(opcode: int, body: bytes) -> None:
    try:
        decoded = m.decoders()[opcode](memoryview(body))
    except ProtocolError:
        return
    assert isinstance(decoded, tuple)


def test_clone_ioctl_number() -> None:
    assert m.DEV_IOC_CLONE == 2 << 30 | 4 << 16 | 229 << 8
    assert os.uname().machine in ("x86_64", "aarch64")
