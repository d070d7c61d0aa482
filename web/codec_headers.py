"""Read the size of an image from the headers of its codec: HEVC in HEIC files, AV1 in AVIF files."""

from collections.abc import Iterator
from functools import lru_cache

from web.heif_boxes import Budget

SEQUENCE_PARAMETERS = 33  # the type of a NAL unit of HEVC
SEQUENCE_HEADER = 1  # the type of an OBU of AV1
HEADER_BYTES = 1000  # enough of a unit to read the size


class Bits:
    """Reads bytes bit by bit. Raises IndexError at the end."""

    def __init__(self, data: bytes) -> None:
        self.bits = "".join(f"{byte:08b}" for byte in data)
        self.at = 0

    def take(self, count: int) -> int:
        """Return the next `count` bits as a number."""
        self.at += count
        if self.at > len(self.bits):
            raise IndexError("a codec's header is cut off")
        return int(self.bits[self.at - count : self.at] or "0", 2)

    def zeros(self) -> int:
        """Return how many 0 bits precede the next 1 bit. Raises ValueError if there is no 1 bit."""
        return self.bits.index("1", self.at) - self.at

    def golomb(self) -> int:
        """Return the next number in Exp-Golomb coding."""
        zeros = self.zeros()
        if zeros > 32:
            raise IndexError("a number of more than 32 bits")
        return self.take(2 * zeros + 1) - 1


def nal_units(content: bytes, length_size: int, budget: Budget) -> Iterator[bytes]:
    """Yield the first HEADER_BYTES of each NAL unit in HEVC data."""
    at = 0
    while at + length_size < len(content):
        budget.spend()
        size = int.from_bytes(content[at : at + length_size], "big")
        at += length_size
        yield content[at : at + min(size, HEADER_BYTES)]
        at += size


@lru_cache(maxsize=8)  # the tiles of a grid all have the same header
def hevc_size(unit: bytes) -> tuple[int, int]:
    """Return the width and height in a sequence parameter set of HEVC (H.265, 7.3.2.2)."""
    bits = Bits(unit[:200].replace(b"\0\0\3", b"\0\0"))
    bits.take(16 + 4)
    layers = bits.take(3)
    bits.take(1 + 88 + 8)  # the general profile and level
    present = [(bits.take(1), bits.take(1)) for _ in range(layers)]
    bits.take(2 * (8 - layers) if layers else 0)
    for profile, level in present:
        bits.take(88 * profile + 8 * level)
    bits.golomb()  # the set's id
    if bits.golomb() == 3:  # chroma 4:4:4
        bits.take(1)
    return bits.golomb(), bits.golomb()


def av1_sequence_headers(content: bytes, budget: Budget) -> Iterator[bytes]:
    """Yield the sequence headers among the OBUs in AV1 data."""
    at = 0
    while at < len(content):
        budget.spend()
        kind, extended, sized = content[at] >> 3 & 15, content[at] & 4, content[at] & 2
        at += 2 if extended else 1
        size, shift = 0 if sized else len(content) - at, 0
        while sized:
            size |= (content[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if content[at - 1] < 128 or shift > 56:
                break
        if kind == SEQUENCE_HEADER:
            yield content[at : at + min(size, HEADER_BYTES)]
        at += size


def av1_sizes(header: bytes) -> list[tuple[int, int]]:
    """Return the size in an AV1 sequence header (AV1, 5.5.1); for a sequence, also half of its largest sides."""
    bits = Bits(header[:200])
    bits.take(3 + 1)
    is_still = bits.take(1)
    if is_still:
        bits.take(5)
    else:
        skip_operating_points(bits)
    width_bits, height_bits = bits.take(4) + 1, bits.take(4) + 1
    width, height = bits.take(width_bits) + 1, bits.take(height_bits) + 1
    # Each frame of a sequence may state another size in the same number of bits, and the decoder does not compare them.
    # Encoders use no more bits than they need, so each side of a good image is at least half of the largest.
    return [(width, height)] if is_still else [(width, height), (2 ** (width_bits - 1), 2 ** (height_bits - 1))]


def skip_operating_points(bits: Bits) -> None:
    """Skip the timing and operating points in a sequence header of AV1."""
    decoder_model, delay_bits = 0, 0
    if bits.take(1):  # timing
        bits.take(64)
        if bits.take(1):  # all pictures take the same time
            bits.take(2 * bits.zeros() + 1)
        decoder_model = bits.take(1)
        if decoder_model:
            delay_bits = bits.take(5) + 1
            bits.take(32 + 5 + 5)
    initial_delay = bits.take(1)
    for _ in range(bits.take(5) + 1):
        bits.take(12)
        if bits.take(5) > 7:
            bits.take(1)
        if decoder_model and bits.take(1):
            bits.take(2 * delay_bits + 1)
        if initial_delay and bits.take(1):
            bits.take(4)
