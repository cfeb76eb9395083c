"""The ELF kernel out of bzImages made by hand, one per compression that kernels use."""

import bz2
import contextlib
import gzip
import lzma
import random
import struct
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcvm.errors import FcvmError, SetupError
from fcvm.setup import bzimage

# Text and noise: something to compress, and something that cannot be.
KERNEL = bytes(bzimage.ELF + b"the kernel " * 20000 + random.Random(1).randbytes(50000))


def make(payload: bytes, *, sectors: int = 3, gap: int = 100, trailer: bytes = b"after") -> bytes:
    """A bzImage whose protected-mode code holds ``payload`` after ``gap`` bytes."""
    setup = bytearray(((sectors or 4) + 1) * 512)
    setup[bzimage.SETUP_SECTS] = sectors
    setup[bzimage.MAGIC_OFFSET : bzimage.MAGIC_OFFSET + 4] = bzimage.MAGIC
    struct.pack_into("<II", setup, bzimage.PAYLOAD, gap, len(payload))
    return bytes(setup) + b"\x90" * gap + payload + trailer


def size(data: bytes) -> bytes:
    return struct.pack("<I", len(data))


def program(*command: str) -> bytes:
    return subprocess.run(command, input=KERNEL, stdout=subprocess.PIPE, check=True).stdout


PAYLOADS = {
    "gzip": lambda: gzip.compress(KERNEL) + size(KERNEL),
    "xz": lambda: lzma.compress(KERNEL, check=lzma.CHECK_CRC32) + size(KERNEL),
    "lzma": lambda: lzma.compress(KERNEL, format=lzma.FORMAT_ALONE) + size(KERNEL),
    "bzip2": lambda: bz2.compress(KERNEL) + size(KERNEL),
    "zstd": lambda: program("zstd", "-19", "-q", "-c") + size(KERNEL),
    "lz4": lambda: program("lz4", "-l", "-9", "-q", "-c") + size(KERNEL),
    "none": lambda: KERNEL,
}


@pytest.mark.parametrize("compression", PAYLOADS)
@pytest.mark.parametrize("sectors", [0, 3, 31])
def test_the_kernel_comes_out_whatever_the_compression(compression: str, sectors: int) -> None:
    assert bzimage.extract(make(PAYLOADS[compression](), sectors=sectors)) == KERNEL


def test_an_elf_kernel_is_returned_as_it_is() -> None:
    assert bzimage.extract(KERNEL) is KERNEL


def test_lz4_of_several_blocks() -> None:
    large = bzimage.ELF + random.Random(2).randbytes(1000) * 9000  # a legacy block holds 8 MiB
    packed = subprocess.run(["lz4", "-l", "-q", "-c"], input=large, stdout=subprocess.PIPE, check=True).stdout
    assert bzimage.extract(make(packed + size(large))) == large


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"", "neither"),
        (b"MZ" + bytes(4000), "neither"),
        (make(PAYLOADS["gzip"](), trailer=b"")[:-10], "cut short"),
        (make(b""), "cut short"),
        (make(b"\x89LZO rest of it"), "unknown way"),
        (make(gzip.compress(b"no elf") + size(b"no elf")), "not an ELF"),
    ],
)
def test_what_is_no_kernel_is_refused_with_the_reason(image: bytes, words: str) -> None:
    with pytest.raises(SetupError, match=words):
        bzimage.extract(image)


@pytest.mark.parametrize("compression", [name for name in PAYLOADS if name != "none"])
def test_a_damaged_payload_is_a_setup_error(compression: str) -> None:
    payload = PAYLOADS[compression]()
    damaged = payload[:200] + bytes(300) + payload[500 : len(payload) // 2] + size(KERNEL)
    with contextlib.suppress(FcvmError):  # any other exception fails the test
        assert bzimage.extract(make(damaged)) != KERNEL


@settings(deadline=None)  # a busy host is no failure
@given(st.binary(max_size=300))
def test_lz4_of_anything_ends_in_data_or_a_known_error(block: bytes) -> None:
    with contextlib.suppress(ValueError, IndexError):
        bzimage.lz4_block(block)


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=400), st.integers(1, 300), st.integers(4, 900)), max_size=8))
def test_lz4_sequences_unpack_to_what_they_describe(parts: list[tuple[bytes, int, int]]) -> None:
    expected, block = bytearray(), bytearray()
    for literals, offset, length in parts:
        expected += literals
        if offset > len(expected):
            offset = len(expected)
        if offset == 0:
            continue
        for _ in range(length):
            expected.append(expected[-offset])
        block += sequence(literals, offset, length)
    block += sequence(b"end", None, 4)
    assert bzimage.lz4_block(bytes(block)) == expected + b"end"


def sequence(literals: bytes, offset: int | None, length: int) -> bytes:
    """One LZ4 sequence as the format describes it; the last one has no match."""
    match = length - 4
    token = min(len(literals), 15) << 4 | (min(match, 15) if offset is not None else 0)
    out = bytes([token]) + extra(len(literals)) + literals
    return out if offset is None else out + struct.pack("<H", offset) + extra(match)


def extra(value: int) -> bytes:
    if value < 15:
        return b""
    full, rest = divmod(value - 15, 255)
    return b"\xff" * full + bytes([rest])
