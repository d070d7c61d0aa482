"""Mutate readable files: random bytes, or parts that the format defines, so that decoders' first checks still pass."""

import re
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from random import Random

import samples

from hostile.cases import READABLE
from hostile.png import SIGNATURE, chunk

Mutation = Callable[[bytes, Random], bytes]

# Limits of integer types and other numbers that often reveal bugs.
INTERESTING = (0, 1, 2, 3, 4, 7, 8, 16, 32, 64, 127, 128, 255, 256, 1000, 2**15 - 1, 2**15, 2**16 - 1, 2**16, 2**24,
               2**31 - 1, 2**31, 2**32 - 1)  # fmt: skip


def flip(data: bytes, random: Random) -> bytes:
    """Change a few bits, anywhere or in the header."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5, 20)) if data else 0):
        changed[random.randrange(random.choice((len(data), min(len(data), 64))))] ^= 1 << random.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, random: Random) -> bytes:
    """Overwrite some bytes with a number, anywhere or in the header."""
    at = random.randrange(random.choice((len(data), min(len(data), 64))) or 1)
    value = number(random)
    return data[:at] + value + data[at + len(value) :]


def number(random: Random) -> bytes:
    size = random.choice((1, 2, 4))
    return (random.choice(INTERESTING) & (1 << 8 * size) - 1).to_bytes(size, random.choice(("little", "big")))


def truncate(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def random_slice(data: bytes, random: Random) -> tuple[int, int]:
    at = random.randrange(len(data) + 1)
    return at, min(len(data), at + random.choice((1, 2, 4, 16, 100, 1000)))


def delete(data: bytes, random: Random) -> bytes:
    start, end = random_slice(data, random)
    return data[:start] + data[end:]


def duplicate(data: bytes, random: Random) -> bytes:
    start, end = random_slice(data, random)
    return data[:end] + data[start:end] * random.choice((1, 1, 3, 50)) + data[end:]


def insert(data: bytes, random: Random) -> bytes:
    start, _ = random_slice(data, random)
    return data[:start] + random.randbytes(random.choice((1, 2, 8, 100))) + data[start:]


def splice(data: bytes, random: Random) -> bytes:
    """Join the head of this file and the tail of another."""
    other = random.choice(seeds())
    return truncate(data, random) + other[random.randrange(len(other)) :]


def change_part(data: bytes, random: Random) -> bytes:
    """Change a part that the format defines, or some bytes if none can be found."""
    for start, change in PARTS.items():
        if data.startswith(start):
            try:
                return change(data, random)
            except (IndexError, ValueError, struct.error):
                break
    return overwrite(data, random)


def change_png(data: bytes, random: Random) -> bytes:
    """Change, drop, duplicate or move a chunk; all CRCs are correct."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunks.append((kind, data[at + 8 : at + 8 + length]))
        at += 12 + length
    i = random.randrange(len(chunks))
    kind, content = chunks.pop(i)
    if kind == b"IDAT" and random.random() < 0.5:  # change the rows themselves, such as a filter
        with suppress(zlib.error):
            content = zlib.compress(flip(zlib.decompress(content), random))
    else:
        kind = random.choice((kind, kind, kind, kind, random.choice(PNG_CHUNKS)))
        content = random.choice((flip, overwrite, truncate, insert))(content, random)
    for _ in range(random.choice((0, 1, 1, 1, 1, 2, 20))):
        chunks.insert(random.choice((i, i, i, random.randrange(len(chunks) + 1))), (kind, content))
    return SIGNATURE + b"".join(chunk(*each) for each in chunks)


PNG_CHUNKS = b"IHDR PLTE IDAT IEND tRNS iCCP iTXt tEXt zTXt eXIf acTL fcTL fdAT gAMA pHYs cHRM sRGB".split()


def change_jpeg(data: bytes, random: Random) -> bytes:
    """Change the kind or length of a segment, or something in it."""
    found = random.choice([each.end() for each in re.finditer(rb"\xff[\xc0-\xfe]", data)])
    at = found + random.choice((-1, 0, 1, random.randrange(2, 20)))
    value = random.choice((number(random), bytes([random.randrange(0xC0, 0xFF)])))
    return data[:at] + value + data[at + len(value) :]


def change_tiff(data: bytes, random: Random) -> bytes:
    """Change the number, type, count or value of an entry of the directory."""
    order = "<" if data[:2] == b"II" else ">"
    [at] = struct.unpack_from(order + "I", data, 4)
    [count] = struct.unpack_from(order + "H", data, at)
    at += 2 + 12 * random.randrange(count)
    entry = list(struct.unpack_from(order + "HHII", data, at))
    field = random.randrange(4)
    entry[field] = (random.choice(TIFF_TAGS), random.randrange(20), *[random.choice(INTERESTING)] * 2)[field]
    return data[:at] + struct.pack(order + "HHII", *entry) + data[at + 12 :]


TIFF_TAGS = (254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 282, 284, 292, 317, 320, 322, 323, 324, 325,
             330, 338, 339, 347, 530, 532, 700, 34665, 34675, 34853, 40965)  # fmt: skip


def change_webp(data: bytes, random: Random) -> bytes:
    """Change the size or content of a chunk, duplicate or drop it; the size of the file is correct."""
    at, found = 12, []
    while at + 8 <= len(data):
        found.append(at)
        at += 8 + sum(struct.unpack_from("<I", data, at + 4))
    at = random.choice(found)
    if random.random() < 0.4:
        changed = data[: at + 4] + struct.pack("<I", random.choice(INTERESTING)) + data[at + 8 :]
    else:
        changed = (
            data[:at]
            + random.choice((flip, overwrite, duplicate, delete))(data[at : at + 200], random)
            + data[at + 200 :]
        )
    return b"RIFF" + struct.pack("<I", len(changed) - 8) + changed[8:]


def change_gif(data: bytes, random: Random) -> bytes:
    """Change the screen, the place or size of a frame, or the length of a block."""
    at = random.choice((6, 8, 10, *[each.start() + 1 for each in re.finditer(rb"[,!]", data)]))
    at += random.choice((0, 0, 2, 4, 6, 8, 9))
    value = number(random)
    return data[:at] + value + data[at + len(value) :]


def change_bmp(data: bytes, random: Random) -> bytes:
    """Change a field of the header."""
    at = random.choice((2, 10, 14, 18, 22, 26, 28, 30, 34, 46, 50, 54, 58))
    value = struct.pack("<I", random.choice(INTERESTING))[: random.choice((1, 2, 4))]
    return data[:at] + value + data[at + len(value) :]


def change_heif(data: bytes, random: Random) -> bytes:
    """Change the size or kind of a box, or something near its start."""
    at = random.choice([each.start() for each in re.finditer(HEIF_BOXES, data)])
    at += random.choice((-4, 0, 4, 8, 12, random.randrange(-4, 40)))
    value = random.choice((number(random), random.choice(HEIF_BOXES.split(b"|"))))
    return data[:at] + value + data[at + len(value) :]


HEIF_BOXES = b"ftyp|meta|hdlr|pitm|iloc|iinf|infe|iref|iprp|ipco|ipma|ispe|hvcC|av1C|colr|pixi|irot|auxC|dimg|auxl|mdat"


PARTS: dict[bytes, Mutation] = {
    b"\x89PNG": change_png, b"\xff\xd8": change_jpeg, b"II*\0": change_tiff, b"MM\0*": change_tiff,
    b"RIFF": change_webp, b"GIF8": change_gif, b"BM": change_bmp, b"\0\0\0": change_heif,
}  # fmt: skip
# Changing a part is as likely as all the others together.
MUTATIONS: tuple[Mutation, ...] = (
    flip, overwrite, truncate, delete, duplicate, insert, splice, *[change_part] * 7
)  # fmt: skip


@cache
def seeds() -> tuple[bytes, ...]:
    """The samples and the readable odd files. They are small, so that one change matters."""
    return tuple([sample.data for sample in samples.samples()] + [make() for make in READABLE.values()])


def mutant(number: int) -> bytes:
    """A readable image with one to five changes. The same number always gives the same mutant."""
    random = Random(number)
    image = random.choice(seeds())
    for mutate in random.choices(MUTATIONS, k=random.randint(1, 5)):
        image = mutate(image, random)
    return image
