"""Takes the ELF kernel (``vmlinux``, which Firecracker boots) out of a bzImage (what distributions ship).

Where the payload lies is told by the setup header, ``Documentation/arch/x86/boot.rst`` of the kernel. It is compressed
with whatever the kernel was configured for, and for most formats followed by its unpacked size (u32, little endian).
"""

import bz2
import gzip
import io
import lzma
import struct
import zlib
from collections.abc import Callable

from fcvm.errors import SetupError
from fcvm.process import run

SETUP_SECTS = 0x1F1  # u8: sectors of real-mode code after the boot sector; 0 means 4
MAGIC_OFFSET, MAGIC = 0x202, b"HdrS"
PAYLOAD = 0x248  # u32 offset from the protected-mode code, u32 length
SECTOR = 512
ELF = b"\x7fELF"


def extract(image: bytes) -> bytes:
    """The ELF kernel inside ``image``; an ``image`` that is one already is returned as it is.

    Raises:
        SetupError: it is not a bzImage, is damaged, or is compressed in a way that we cannot undo.
    """
    if image.startswith(ELF):
        return image
    payload = payload_of(image)
    for magic, name, decompress in FORMATS:
        if payload.startswith(magic):
            try:
                kernel = decompress(payload)
            except (OSError, EOFError, ValueError, IndexError, struct.error, zlib.error, lzma.LZMAError) as error:
                raise SetupError(f"The kernel is damaged: its {name} payload cannot be unpacked ({error}).") from error
            if not kernel.startswith(ELF):
                raise SetupError("The kernel is damaged: its payload is not an ELF file.")
            return kernel
    if payload.startswith(ELF):
        return payload
    raise SetupError(f"The kernel is compressed in an unknown way (it starts with {payload[:4].hex()}).")


def payload_of(image: bytes) -> bytes:
    """The compressed payload of a bzImage, its trailing size included.

    Raises:
        SetupError: it is not a bzImage of boot protocol 2.08 (Linux 2.6.26) or later, or is cut short.
    """
    if len(image) < PAYLOAD + 8 or image[MAGIC_OFFSET : MAGIC_OFFSET + 4] != MAGIC:
        raise SetupError("The kernel is neither an ELF file nor a bzImage.")
    start = ((image[SETUP_SECTS] or 4) + 1) * SECTOR
    offset, length = struct.unpack_from("<II", image, PAYLOAD)
    payload = image[start + offset : start + offset + length]
    if not length or len(payload) != length:
        raise SetupError("The kernel is damaged: its bzImage is cut short.")
    return payload


def _gzip(payload: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(payload[:-4])) as file:
        return file.read()


def _xz(payload: bytes) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)


def _lzma(payload: bytes) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(payload)


def _bzip2(payload: bytes) -> bytes:
    return bz2.BZ2Decompressor().decompress(payload)


def _zstd(payload: bytes) -> bytes:
    return run(["zstd", "-dcq"], input=payload[:-4]).stdout


def _lz4(payload: bytes) -> bytes:
    """LZ4's legacy frame: a magic, then blocks of at most 8 MiB, each after its packed size (u32)."""
    view = memoryview(payload)[4:-4]
    blocks = []
    while view:
        (length,) = struct.unpack_from("<I", view)
        block = view[4 : 4 + length]
        if len(block) != length:
            raise ValueError("a block is cut short")
        blocks.append(lz4_block(bytes(block)))
        view = view[4 + length :]
    return b"".join(blocks)


def lz4_block(block: bytes) -> bytes:
    """Unpack one LZ4 block: sequences of a token, literals, and a match to copy from what was already unpacked."""
    out = bytearray()
    position = 0
    while position < len(block):
        token = block[position]
        literals, position = _lz4_length(block, position + 1, token >> 4)
        out += block[position : position + literals]
        position += literals
        if position >= len(block):  # the last sequence has no match
            break
        offset = block[position] | block[position + 1] << 8
        if not 0 < offset <= len(out):
            raise ValueError("a match lies outside of the data")
        length, position = _lz4_length(block, position + 2, token & 15)
        length += 4
        start = len(out) - offset
        if offset >= length:
            out += out[start : start + length]
        else:  # the match overlaps what it makes: a repetition
            pattern = bytes(out[start:])
            out += (pattern * (length // offset + 1))[:length]
    return bytes(out)


def _lz4_length(block: bytes, position: int, nibble: int) -> tuple[int, int]:
    length = nibble
    if nibble == 15:
        while True:
            more = block[position]
            position += 1
            length += more
            if more != 255:
                break
    return length, position


FORMATS: tuple[tuple[bytes, str, Callable[[bytes], bytes]], ...] = (
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
    (b"\xfd7zXZ\0", "xz", _xz),
    (b"\x02\x21\x4c\x18", "lz4", _lz4),
    (b"\x1f\x8b", "gzip", _gzip),
    (b"BZh", "bzip2", _bzip2),
    (b"\x5d\0\0", "lzma", _lzma),
)
