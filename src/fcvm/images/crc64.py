"""CRC-64 of ISO 3309, as Go's hash/crc64 computes it: about 350 MB/s, where a table by bytes in Python does 10.

All of the data is one polynomial over GF(2), here an integer whose lowest bit has the highest degree (the CRC is a
"reflected" one). The remainder of its division by x^64 + x^4 + x^3 + x + 1 is quick to find for long integers because
squaring a polynomial over GF(2) only spreads its terms: for s a power of two, x^64s leaves

    x^4s + x^3s + x^s + 1  =  (x^s + 1) (x^3s + 1)

so multiplying by x^64s takes two shifts and two xors, whatever the length.
"""

ONES = (1 << 64) - 1

STEP = 1024
ROW = 64 * STEP // 8  # bytes; the fastest length, measured: an integer of it stays in the first-level cache
_OVERFLOW = (1 << 4 * STEP) - 1


def crc64(data: bytes, crc: int = 0) -> int:
    """The CRC of ``data``; ``crc`` is that of the bytes before it."""
    value = crc ^ ONES
    whole = len(data) - len(data) % ROW
    if whole > ROW:
        # Horner's scheme: multiply what there is by x^64s, reduce it to the length of a row, add the next row.
        view = memoryview(data)
        rows = int.from_bytes(view[:ROW], "little") ^ value
        for position in range(ROW, whole, ROW):
            rows ^= rows << STEP
            rows ^= rows << 3 * STEP
            over = rows & _OVERFLOW
            over ^= over << STEP
            over ^= over << 3 * STEP
            rows >>= 4 * STEP
            rows ^= over << (8 * ROW - 8 * STEP)
            rows ^= int.from_bytes(view[position : position + ROW], "little")
        data, value = rows.to_bytes(ROW, "little") + data[whole:], 0
    return _remainder(int.from_bytes(data, "little") ^ value, len(data) * 8 + 64) ^ ONES


def _remainder(value: int, bits: int) -> int:
    """What is left of ``value``, a polynomial of ``bits`` terms: each round about halves it."""
    while bits > 64:
        step = 1 << ((bits - 1) // 64).bit_length() - 1
        length = max(64 * step, bits - 60 * step)
        low = value >> (bits - 64 * step)
        high = value ^ (low << (bits - 64 * step))
        high ^= high << step
        high ^= high << 3 * step
        value = (low << (length - 64 * step)) ^ (high << (length - bits + 60 * step))
        bits = length
    return value
