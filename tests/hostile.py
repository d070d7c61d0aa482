"""Makers of files that no encoder writes: parts of each format put together by hand, odd forms, and bombs.

A bomb costs far more than its size: each of these took seconds or gigabytes of some release of a library.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, partial
from random import Random
from typing import Any

import numpy as np
import samples
from PIL import Image
from samples import colours, saved

Tag = tuple[int, int, int, bytes | int]  # of a TIFF: number, type, count, values (an int stands in the entry itself)

SMALL = Image.fromarray(colours(0, (60, 40)))
PNG_START = b"\x89PNG\r\n\x1a\n"
CLAIM = 50_000  # pixels, both ways
SHORT, LONG, RATIONAL, SLONG8 = 3, 4, 5, 17  # types of a TIFF's tag


# Parts


def chunk(kind: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A chunk of a PNG with the right CRC, and where asked for a wrong length."""
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data) if length is None else length) + kind + data + struct.pack(">I", crc)


def header(width: int, height: int, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def png(*chunks: bytes, rows: bytes = b"", end: bytes | None = None) -> bytes:
    """A PNG of these chunks and the packed `rows`."""
    data = chunk(b"IDAT", zlib.compress(rows)) if rows else b""
    return PNG_START + b"".join(chunks) + data + (chunk(b"IEND") if end is None else end)


def rgb_png(*chunks: bytes, after: bytes = b"") -> bytes:
    """A good PNG of 4x4 pixels, with these chunks ahead of its pixels and others behind them."""
    return png(header(4, 4), *chunks, chunk(b"IDAT", zlib.compress((b"\0" + b"\x80" * 12) * 4)), after)


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


@cache
def jpeg(mode: str = "RGB", progressive: bool = False) -> bytes:
    return saved(SMALL.convert(mode), "JPEG", progressive=progressive)


def jpeg_with(*parts: bytes, image: bytes | None = None) -> bytes:
    """A JPEG with these parts right behind its first two bytes."""
    whole = jpeg() if image is None else image
    return whole[:2] + b"".join(parts) + whole[2:]


def tiff(tags: Iterable[Tag], data: bytes = b"", order: str = "<", big: bool = False, following: int = 0) -> bytes:
    """A TIFF of one directory, with `data` behind it."""
    entries, values = [], b""
    tags = sorted(tags)
    start = (16 if big else 8) + (8 if big else 2) + len(tags) * (20 if big else 12) + (8 if big else 4)
    number, room = ("Q", 8) if big else ("I", 4)
    for tag, kind, count, value in tags:
        if isinstance(value, int):
            field = struct.pack(order + ("H" if kind == SHORT else number), value).ljust(room, b"\0")
        elif len(value) <= room:
            field = value.ljust(room, b"\0")
        else:
            field = struct.pack(order + number, start + len(values))
            values += value
        entries.append(struct.pack(order + "HH" + number, tag, kind, count) + field)
    name = b"II" if order == "<" else b"MM"
    head = struct.pack(order + "HHHQ", 43, 8, 0, 16) if big else struct.pack(order + "HI", 42, 8)
    counted = struct.pack(order + ("Q" if big else "H"), len(entries))
    return name + head + counted + b"".join(entries) + struct.pack(order + number, following) + values + data


def grey_tags(width: int, height: int, *more: Tag, compression: int = 1) -> list[Tag]:
    """The tags of a grey image; `more` win over them."""
    tags: dict[int, Tag] = {
        tag: (tag, SHORT if tag > 257 else LONG, 1, value)
        for tag, value in {256: width, 257: height, 258: 8, 259: compression, 262: 1, 277: 1}.items()
    }
    return list((tags | {each[0]: each for each in more}).values())


def strip(width: int, height: int, data: bytes, *more: Tag, compression: int = 1, order: str = "<") -> bytes:
    """A grey TIFF whose only strip is `data`."""
    where = [(273, LONG, 1, 1000), (279, LONG, 1, len(data)), *more]
    return tiff(grey_tags(width, height, *where, compression=compression), order=order).ljust(1000, b"\0") + data


def tiled(side: int, tile: int, data: bytes, kind: int = LONG) -> bytes:
    """A grey deflated TIFF of `side` pixels, whose only tile is `data` and claims to be of `tile` pixels."""
    value: bytes | int = struct.pack("<q", tile) if kind == SLONG8 else tile
    where: list[Tag] = [(322, kind, 1, value), (323, kind, 1, value), (324, LONG, 1, 1000), (325, LONG, 1, len(data))]
    return tiff(grey_tags(side, side, *where, compression=8)).ljust(1000, b"\0") + data


def gif(width: int, height: int, *parts: bytes, colours: int = 2) -> bytes:
    """A GIF of these parts, whose palette has so many greys; none for 0."""
    bits = max(colours.bit_length() - 2, 0)
    palette = b"".join(bytes([i * 60 % 256]) * 3 for i in range(2 << bits)) if colours else b""
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0x80 | bits if colours else 0, 0, 0)
        + palette
        + b"".join(parts)
    )


def frame(x: int, y: int, width: int, height: int, pixels: bytes = b"") -> bytes:
    """A frame of a GIF: as black as its first 300 pixels, or of these `pixels`."""
    return b"," + struct.pack("<HHHHB", x, y, width, height, 0) + (pixels or black(min(width * height, 300)))


def black(count: int) -> bytes:
    """So many pixels of a GIF, in LZW of codes of three bits: before each pixel the dictionary is cleared."""
    clear, pixel, end = 4, 0, 5
    codes = [clear, pixel] * count + [end]
    bits = sum(code << 3 * i for i, code in enumerate(codes))
    data = bits.to_bytes(len(codes) * 3 // 8 + 1, "little")
    return bytes([2, len(data)]) + data + b"\0"


def bmp(width: int, height: int, bits: int, data: bytes, *, compression: int = 0, palette: bytes = b"") -> bytes:
    fields = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, len(palette) // 4, 0)
    return (
        b"BM" + struct.pack("<IHHI", 54 + len(palette) + len(data), 0, 0, 54 + len(palette)) + fields + palette + data
    )


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP of these chunks."""
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_canvas(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return b"VP8X", bytes([flags, 0, 0, 0]) + size


def box(kind: bytes, *content: bytes, size: int | None = None) -> bytes:
    """A box of a HEIC or AVIF, where asked for of a wrong size."""
    data = b"".join(content)
    return struct.pack(">I", len(data) + 8 if size is None else size) + kind + data


def full_box(kind: bytes, version: int, *content: bytes, flags: int = 0) -> bytes:
    return box(kind, bytes([version]), struct.pack(">I", flags)[1:], *content)


Item = tuple[bytes, list[bytes], bytes]  # its type, its properties, and its data


def heif(*items: Item, links: Iterable[tuple[bytes, int, list[int]]] = (), brand: bytes = b"heic", primary: int = 1,
         more: bytes = b"") -> bytes:  # fmt: skip
    """A HEIC or AVIF of these items, numbered from 1, and these references from one to others."""
    ids = range(1, len(items) + 1)
    entries = [full_box(b"infe", 2, struct.pack(">HH", i, 0), items[i - 1][0], b"\0") for i in ids]
    owned, properties = [], list[bytes]()
    for i, (_, own, _) in zip(ids, items, strict=True):
        numbers = bytes(len(properties) + 1 + number for number in range(len(own)))
        owned.append(struct.pack(">HB", i, len(own)) + numbers)
        properties += own
    ahead = box(b"ftyp", brand, b"\0\0\0\0", brand, b"mif1")

    def meta(start: int) -> bytes:
        places = []
        for i, (_, _, data) in zip(ids, items, strict=True):
            places.append(struct.pack(">HHHII", i, 0, 1, start, len(data)))
            start += len(data)
        return full_box(
            b"meta", 0, full_box(b"hdlr", 0, b"\0\0\0\0pict", b"\0" * 13),
            full_box(b"pitm", 0, struct.pack(">H", primary)),
            full_box(b"iloc", 0, b"\x44\0", struct.pack(">H", len(items)), *places),
            full_box(b"iinf", 0, struct.pack(">H", len(items)), *entries),
            full_box(b"iref", 0, *(box(kind, struct.pack(f">HH{len(to)}H", i, len(to), *to)) for kind, i, to in links)),
            box(b"iprp", box(b"ipco", *properties), full_box(b"ipma", 0, struct.pack(">I", len(items)), *owned)), more,
        )  # fmt: skip

    start = len(ahead) + len(meta(0)) + 8
    return ahead + meta(start) + box(b"mdat", *(data for _, _, data in items))


def ispe(width: int, height: int) -> bytes:
    return full_box(b"ispe", 0, struct.pack(">II", width, height))


def grid(rows: int, columns: int, width: int, height: int) -> bytes:
    return bytes([0, 1, rows - 1, columns - 1]) + struct.pack(">II", width, height)


@cache
def coded(form: str) -> tuple[bytes, bytes]:
    """The codec's header (hvcC or av1C) and the pixels of SMALL, in HEIC or AVIF."""
    data = saved(SMALL, "HEIF", chroma=420) if form == "HEIC" else saved(SMALL, "AVIF", speed=10)
    kind = b"hvcC" if form == "HEIC" else b"av1C"
    at = data.index(kind) - 4
    [size] = struct.unpack_from(">I", data, at)
    pixels = data[data.index(b"mdat") + 4 :]
    return data[at : at + size], pixels


def heic_item(*properties: bytes, pixels: bytes | None = None, header: bytes | None = None) -> Item:
    own, data = coded("HEIC")
    return b"hvc1", [header or own, *(properties or [ispe(64, 64)])], pixels or data  # as libx265 pads it


def avif_item(*properties: bytes, pixels: bytes | None = None) -> Item:
    own, data = coded("AVIF")
    depth = full_box(b"pixi", 0, b"\3\x08\x08\x08")
    return b"av01", [own, depth, *(properties or [ispe(60, 40)])], pixels or data


def golomb(number: int) -> str:
    digits = f"{number + 1:b}"
    return "0" * (len(digits) - 1) + digits


def as_bytes(bits: str) -> bytes:
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")


def hevc_of(width: int, height: int) -> bytes:
    """The codec's header of SMALL, an hvcC, with another size in its sequence parameter set."""
    header, _ = coded("HEIC")
    at = header.index(b"\x42\1")
    [size] = struct.unpack_from(">H", header, at - 2)
    bits = "".join(f"{byte:08b}" for byte in header[at : at + size].replace(b"\0\0\3", b"\0\0"))
    old = golomb(64) + golomb(64)
    assert old in bits, bits
    unit = as_bytes(bits.replace(old, golomb(width) + golomb(height), 1)).replace(b"\0\0", b"\0\0\3")
    return box(b"hvcC", header[8 : at - 2], struct.pack(">H", len(unit)), unit, header[at + size :])


def av1_of(width: int, height: int) -> bytes:
    """The pixels of SMALL in AV1, with another size in their sequence header."""
    _, pixels = coded("AVIF")
    at = pixels.index(b"\x0a")
    size = pixels[at + 1]
    bits = "".join(f"{byte:08b}" for byte in pixels[at + 2 : at + 2 + size])
    old = f"{5:04b}{5:04b}{59:06b}{39:06b}"
    assert old in bits, bits
    unit = as_bytes(bits.replace(old, f"{15:04b}{15:04b}{width - 1:016b}{height - 1:016b}", 1))
    return pixels[:at] + bytes([0x0A, len(unit)]) + unit + pixels[at + 2 + size :]


GREYS = b"".join(bytes([i, i, 255 - i, 0]) for i in range(0, 256, 16))


# Mutations: of some bytes, or of a part that its format knows, so that the change gets past the first checks

INTERESTING = (0, 1, 2, 3, 4, 7, 8, 16, 32, 64, 127, 128, 255, 256, 1000, 2**15 - 1, 2**15, 2**16 - 1, 2**16, 2**24,
               2**31 - 1, 2**31, 2**32 - 1)  # fmt: skip
Mutation = Callable[[bytes, Random], bytes]


def flip(data: bytes, random: Random) -> bytes:
    """Change a few bits, anywhere or in the first bytes, where headers are."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5, 20)) if data else 0):
        changed[random.randrange(random.choice((len(data), min(len(data), 64))))] ^= 1 << random.randrange(8)
    return bytes(changed)


def overwrite(data: bytes, random: Random) -> bytes:
    """Put a number that programs stumble over somewhere."""
    at = random.randrange(random.choice((len(data), min(len(data), 64))) or 1)
    value = number(random)
    return data[:at] + value + data[at + len(value) :]


def number(random: Random) -> bytes:
    size = random.choice((1, 2, 4))
    return (random.choice(INTERESTING) & (1 << 8 * size) - 1).to_bytes(size, random.choice(("little", "big")))


def truncate(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def slice_of(data: bytes, random: Random) -> tuple[int, int]:
    at = random.randrange(len(data) + 1)
    return at, min(len(data), at + random.choice((1, 2, 4, 16, 100, 1000)))


def delete(data: bytes, random: Random) -> bytes:
    start, end = slice_of(data, random)
    return data[:start] + data[end:]


def duplicate(data: bytes, random: Random) -> bytes:
    start, end = slice_of(data, random)
    return data[:end] + data[start:end] * random.choice((1, 1, 3, 50)) + data[end:]


def insert(data: bytes, random: Random) -> bytes:
    start, _ = slice_of(data, random)
    return data[:start] + random.randbytes(random.choice((1, 2, 8, 100))) + data[start:]


def splice(data: bytes, random: Random) -> bytes:
    """The head of this file and the tail of another."""
    other = random.choice(seeds())
    return truncate(data, random) + other[random.randrange(len(other)) :]


def change_part(data: bytes, random: Random) -> bytes:
    """Change a part as its format has them; some bytes where it has none any more."""
    for start, change in PARTS.items():
        if data.startswith(start):
            try:
                return change(data, random)
            except (IndexError, ValueError, struct.error):
                break  # what is left of it has no such part
    return overwrite(data, random)


def change_png(data: bytes, random: Random) -> bytes:
    """Change, drop, double or move a chunk, and mend its CRC."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunks.append((kind, data[at + 8 : at + 8 + length]))
        at += 12 + length
    i = random.randrange(len(chunks))
    kind, content = chunks.pop(i)
    if kind == b"IDAT" and random.random() < 0.5:  # what is packed in it, such as the filter of a row
        with suppress(zlib.error):
            content = zlib.compress(flip(zlib.decompress(content), random))
    else:
        kind = random.choice((kind, kind, kind, kind, random.choice(PNG_CHUNKS)))
        content = random.choice((flip, overwrite, truncate, insert))(content, random)
    for _ in range(random.choice((0, 1, 1, 1, 1, 2, 20))):
        chunks.insert(random.choice((i, i, i, random.randrange(len(chunks) + 1))), (kind, content))
    return PNG_START + b"".join(chunk(*each) for each in chunks)


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
    """Change the size or content of a chunk, double it or drop it, and mend the size of the whole."""
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
    """Change the screen, or a frame's place or size, or the length of a block."""
    at = random.choice((6, 8, 10, *[each.start() + 1 for each in re.finditer(rb"[,!]", data)]))
    at += random.choice((0, 0, 2, 4, 6, 8, 9))
    value = number(random)
    return data[:at] + value + data[at + len(value) :]


def change_bmp(data: bytes, random: Random) -> bytes:
    at = random.choice((2, 10, 14, 18, 22, 26, 28, 30, 34, 46, 50, 54, 58))
    value = struct.pack("<I", random.choice(INTERESTING))[: random.choice((1, 2, 4))]
    return data[:at] + value + data[at + len(value) :]


def change_heif(data: bytes, random: Random) -> bytes:
    """Change the size or kind of a box, or something at its beginning."""
    at = random.choice([each.start() for each in re.finditer(HEIF_BOXES, data)])
    at += random.choice((-4, 0, 4, 8, 12, random.randrange(-4, 40)))
    value = random.choice((number(random), random.choice(HEIF_BOXES.split(b"|"))))
    return data[:at] + value + data[at + len(value) :]


HEIF_BOXES = b"ftyp|meta|hdlr|pitm|iloc|iinf|infe|iref|iprp|ipco|ipma|ispe|hvcC|av1C|colr|pixi|irot|auxC|dimg|auxl|mdat"


PARTS: dict[bytes, Mutation] = {
    b"\x89PNG": change_png, b"\xff\xd8": change_jpeg, b"II*\0": change_tiff, b"MM\0*": change_tiff,
    b"RIFF": change_webp, b"GIF8": change_gif, b"BM": change_bmp, b"\0\0\0": change_heif,
}  # fmt: skip
# A change of a part is as likely as all the others together.
MUTATIONS: tuple[Mutation, ...] = (
    flip, overwrite, truncate, delete, duplicate, insert, splice, *[change_part] * 7
)  # fmt: skip


@cache
def seeds() -> tuple[bytes, ...]:
    """Good files of every format and mode, and of odd forms: the small ones, of which one change is a large part."""
    return tuple(
        [sample.data for sample in samples.samples()] + [make() for make, status in ODD.values() if status == 200]
    )


def cut(make: Callable[[], bytes], share: int) -> bytes:
    data = make()
    return data[: len(data) * share // 100]


def replaced(data: bytes, mark: bytes, offset: int, value: bytes) -> bytes:
    """`data` with `value` so many bytes behind the first `mark`."""
    at = data.index(mark) + offset
    return data[:at] + value + data[at + len(value) :]


# Odd forms, and what is no image: each with the status that it is answered

ODD: dict[str, tuple[Callable[[], bytes], int]] = {}


def odd(status: int) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    def register(function: Callable[[], bytes]) -> Callable[[], bytes]:
        ODD[function.__name__] = (function, status)
        return function

    return register


def add(status: int, **made: Callable[[], bytes]) -> None:
    ODD.update({name: (make, status) for name, make in made.items()})


def of_mode(mode: str, form: str, size: tuple[int, int] = (60, 40), **options: Any) -> Callable[[], bytes]:
    """A file that Pillow itself writes."""
    return lambda: saved(SMALL.convert(mode).resize(size), form, **options)


def of_values(values: Any, form: str = "TIFF", **options: Any) -> Callable[[], bytes]:
    return lambda: saved(Image.fromarray(values), form, **options)


RAMP = np.arange(64).reshape(8, 8)
for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
    add(200, **{f"{form}_of_{w}x{h}": of_mode("RGB", form, (w, h)) for w, h in ((1, 1), (1, 200), (3000, 1))})
    add(400, **{f"{form}_cut_at_{share}": partial(cut, of_mode("RGB", form), share) for share in (10, 50, 90)})

add(
    200,
    png_of_1_bit=of_mode("1", "PNG"),
    png_of_2_bits=lambda: png(header(8, 2, 2, 0), rows=b"\0\x1b\x1b" * 2),
    png_of_4_bits_with_palette=lambda: png(header(4, 2, 4, 3), chunk(b"PLTE", b"abcdef"), rows=b"\0\x01\x01" * 2),
    png_of_16_bits_rgb=lambda: png(header(2, 2, 16, 2), rows=(b"\0" + b"\x80\1" * 6) * 2),
    png_of_16_bits_rgba=lambda: png(header(2, 2, 16, 6), rows=(b"\0" + b"\x80\1" * 8) * 2),
    png_of_16_bits_grey_with_alpha=lambda: png(header(2, 2, 16, 4), rows=(b"\0" + b"\x80\1" * 4) * 2),
    png_of_16_bits_with_a_transparent_grey=lambda: png(
        header(2, 2, 16, 0), chunk(b"tRNS", b"\x80\1"), rows=(b"\0" + b"\x80\1" * 2) * 2
    ),
    png_of_16_bits_with_a_transparent_colour=lambda: png(
        header(2, 2, 16, 2), chunk(b"tRNS", b"\x80\1" * 3), rows=(b"\0" + b"\x80\1" * 6) * 2
    ),
    png_interlaced=lambda: png(header(1, 1, interlace=1), rows=b"\0abc"),
    png_with_an_index_beyond_its_palette=lambda: png(header(2, 1, 8, 3), chunk(b"PLTE", b"abc"), rows=b"\0\0\xff"),
    png_with_a_transparency_longer_than_its_palette=lambda: png(
        header(2, 1, 8, 3), chunk(b"PLTE", b"abc"), chunk(b"tRNS", b"\0\x80" * 2), rows=b"\0\0\0"
    ),
    png_without_an_end=lambda: png(header(4, 4), rows=(b"\0" + b"\x80" * 12) * 4, end=b""),
    png_with_data_behind_its_end=lambda: rgb_png() + b"<script>" * 100,
    png_with_empty_pieces_of_pixels=lambda: rgb_png(chunk(b"IDAT"), chunk(b"IDAT")),
    png_animated=of_mode("RGB", "PNG", save_all=True, append_images=[Image.new("RGB", (60, 40))]),
    png_animated_whose_first_frame_is_small=lambda: png(
        header(4, 4), chunk(b"acTL", struct.pack(">II", 1, 0)),
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 2, 2, 1, 1, 1, 10, 0, 0)), rows=b"\0abcdef" * 2
    ),
    png_with_an_orientation_of_9=lambda: rgb_png(chunk(b"eXIf", tiff([(0x0112, SHORT, 1, 9)]))),
    png_with_an_exif_of_nothing=lambda: rgb_png(chunk(b"eXIf")),
    png_with_a_profile_that_is_broken=lambda: rgb_png(chunk(b"iCCP", b"x\0\0rubbish")),
    png_with_a_wrong_crc_of_a_text=lambda: rgb_png(chunk(b"tEXt", b"a\0b")[:-1] + b"!"),
    png_with_texts=lambda: rgb_png(chunk(b"tEXt", b"a\0b"), chunk(b"zTXt", b"a\0\0" + zeros(9)), chunk(b"iTXt", b"a")),
)  # fmt: skip
add(
    400,
    png_of_zero_width=lambda: png(header(0, 4), rows=b"\0"),
    png_of_zero_height=lambda: png(header(4, 0), rows=b"\0"),
    png_without_pixels=lambda: png(header(4, 4)),
    png_without_a_header=lambda: png(rows=b"\0abc"),
    png_with_a_short_header=lambda: png(chunk(b"IHDR", b"\0\0\0\1")),
    png_of_an_unknown_depth=lambda: png(header(2, 2, 3, 2), rows=b"\0" * 99),
    png_of_a_filter_that_is_not=lambda: png(header(2, 1), rows=b"\x09abcdef"),
    png_with_a_wrong_crc=lambda: replaced(rgb_png(), b"IHDR", 17, b"!!!!"),
    png_with_a_wrong_crc_of_its_transparency=lambda: rgb_png(chunk(b"tRNS", b"a" * 6)[:-1] + b"!"),
    png_with_a_transparency_of_odd_length=lambda: rgb_png(chunk(b"tRNS", b"abc")),
    png_with_a_bad_chunk_name=lambda: rgb_png(chunk(b"\0\1\2\3", b"")),
    png_whose_frames_are_out_of_order=lambda: rgb_png(
        chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", struct.pack(">I", 7) + b"\0" * 22)
    ),
)
add(
    200,
    png_without_its_palette=lambda: png(header(2, 1, 8, 3), rows=b"\0\0\1"),  # the indices are taken as greys
    png_with_too_few_rows=lambda: png(header(4, 400), rows=b"\0" * 13),  # its pixels end properly: the rest is black
)


def exif(*tags: Tag, following: int = 0) -> bytes:
    return segment(0xE1, b"Exif\0\0" + tiff(tags, following=following))


add(
    200,
    jpeg_with_rubbish_ahead_of_its_end=lambda: jpeg()[:-2] + b"rubbish" * 9 + b"\xff\xd9",
    jpeg_with_rubbish_behind_its_end=lambda: jpeg() + b"\xff\xda" * 1000,
    jpeg_cmyk_inverted=lambda: jpeg("CMYK"),
    jpeg_ycck=lambda: jpeg("CMYK").replace(b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\2"),
    jpeg_of_rgb_components=of_mode("RGB", "JPEG", keep_rgb=True),
    jpeg_with_odd_sampling=of_mode("RGB", "JPEG", subsampling="4:1:1", quality=1),
    jpeg_with_restarts=of_mode("RGB", "JPEG", restart_marker_blocks=1),
    jpeg_progressive=lambda: jpeg(progressive=True),
    jpeg_with_padding=lambda: jpeg_with(segment(0xFE, b""), b"\xff" * 100),
    jpeg_with_a_comment=lambda: jpeg_with(segment(0xFE, b"\0\xff\xd8\xff" * 100)),
    jpeg_with_an_exif_of_rubbish=lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + b"\xee" * 200)),
    jpeg_with_an_exif_of_nothing=lambda: jpeg_with(segment(0xE1, b"Exif\0\0")),
    jpeg_with_an_exif_that_goes_in_circles=lambda: jpeg_with(exif((34665, LONG, 1, 8), (330, LONG, 1, 8), following=8)),
    jpeg_with_an_exif_of_huge_counts=lambda: jpeg_with(exif((0x0112, SHORT, 2**32 - 1, b"\0" * 8), (282, 5, 2**31, 0))),
    jpeg_with_an_orientation_of_0=lambda: jpeg_with(exif((0x0112, SHORT, 1, 0))),
    jpeg_with_an_orientation_of_9=lambda: jpeg_with(exif((0x0112, SHORT, 1, 9))),
    jpeg_with_an_orientation_in_words=lambda: jpeg_with(exif((0x0112, 2, 8, b"upright\0"))),
    jpeg_with_two_orientations=lambda: jpeg_with(exif((0x0112, SHORT, 2, b"\6\0\3\0"))),
    jpeg_with_a_resolution_by_zero=lambda: jpeg_with(exif((282, RATIONAL, 1, b"\0" * 8), (296, SHORT, 1, 2))),
    jpeg_with_a_broken_profile=lambda: jpeg_with(segment(0xE2, b"ICC_PROFILE\0\7\1rubbish")),
    jpeg_with_a_broken_index_of_images=lambda: jpeg_with(segment(0xE2, b"MPF\0" + b"II*\0\x08\0\0\0\xff\xff")),
    mpo=of_mode("RGB", "MPO", save_all=True, append_images=[SMALL.rotate(90)]),
)
add(
    400,
    jpeg_without_its_end_and_pixels=lambda: jpeg()[: jpeg().index(b"\xff\xda")],
    jpeg_without_a_frame_header=lambda: b"\xff\xd8" + jpeg()[jpeg().index(b"\xff\xc4") :],
    jpeg_of_zero_width=lambda: replaced(jpeg(), b"\xff\xc0", 7, b"\0\0"),
    jpeg_of_12_bits=lambda: replaced(jpeg(), b"\xff\xc0", 4, b"\x0c"),
    jpeg_lossless=lambda: replaced(jpeg(), b"\xff\xc0", 0, b"\xff\xc3"),
    jpeg_of_two_components=lambda: replaced(jpeg(), b"\xff\xc0", 9, b"\2"),
    jpeg_hierarchical=lambda: replaced(jpeg(), b"\xff\xc0", 0, b"\xff\xc5"),
    jpeg_progressive_cut_off=lambda: jpeg(progressive=True)[:-200],
    jpeg_of_two_beginnings=lambda: b"\xff\xd8" + jpeg(),
)
# Arithmetic coding is in the standard, if in few files; these codes are Huffman's, so what comes out is noise.
add(200, jpeg_arithmetic=lambda: replaced(jpeg(), b"\xff\xc0", 0, b"\xff\xc9"))

add(
    200,
    gif_without_colours=lambda: gif(2, 2, frame(0, 0, 2, 2), b";", colours=0),
    gif_with_a_frame_outside_of_its_screen=lambda: gif(2, 2, frame(50, 50, 2, 2), b";"),
    gif_with_a_frame_larger_than_its_screen=lambda: gif(1, 1, frame(0, 0, 2, 2), b";"),
    gif_without_an_end=lambda: gif(2, 2, frame(0, 0, 2, 2)),
    gif_with_transparency=of_mode("P", "GIF", transparency=0),
    gif_interlaced=of_mode("P", "GIF", interlace=True),
    gif_with_a_transparent_index_beyond_its_palette=lambda: gif(2, 2, b"!\xf9\4\1\0\0\xff\0", frame(0, 0, 2, 2), b";"),
    gif_of_version_87=lambda: b"GIF87a" + gif(2, 2, frame(0, 0, 2, 2), b";")[6:],
)
add(
    400,
    gif_without_a_frame=lambda: gif(2, 2, b";"),
    gif_of_zero_size=lambda: gif(0, 0, frame(0, 0, 0, 0), b";"),
    gif_with_a_frame_of_zero_size=lambda: gif(2, 2, frame(0, 0, 0, 0), b";"),
    gif_of_codes_that_are_too_long=lambda: gif(2, 2, frame(0, 0, 2, 2, b"\x0d\2\x44\1\0"), b";"),
    gif_of_codes_that_are_none=lambda: gif(2, 2, frame(0, 0, 2, 2, b"\2\5\xff\xff\xff\xff\xff\0"), b";"),
)

add(
    200,
    bmp_top_down=lambda: bmp(4, -2, 24, b"\x80" * 24),
    bmp_of_1_bit=of_mode("1", "BMP"),
    bmp_of_4_bits=lambda: bmp(8, 2, 4, b"\x12\x34\x56\x78" * 2, palette=GREYS),
    bmp_of_run_length_8=lambda: bmp(4, 2, 8, b"\4\1\0\0\4\2\0\1", compression=1, palette=GREYS),
    bmp_of_run_length_4=lambda: bmp(4, 2, 4, b"\4\x12\0\0\4\x21\0\1", compression=2, palette=GREYS),
    bmp_of_run_lengths_that_jump=lambda: bmp(
        4, 4, 8, b"\1\1\0\2\1\1" + b"\0\0" + b"\4\1\0\0" * 2 + b"\0\1", compression=1, palette=GREYS
    ),
    bmp_of_16_bits=lambda: bmp(2, 1, 16, b"\x12\x34" * 2),
    bmp_of_16_bits_with_fields=lambda: bmp(
        2, 1, 16, b"\x12\x34" * 2, compression=3, palette=struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    ),
    bmp_of_32_bits=lambda: bmp(2, 1, 32, b"\x80" * 8),
    bmp_of_os2=lambda: b"BM" + struct.pack("<IHHIIHHHH", 38, 0, 0, 26, 12, 2, 2, 1, 24) + b"\x80" * 16,
)
add(
    400,
    bmp_of_zero_width=lambda: bmp(0, 2, 24, b"\x80" * 24),
    bmp_of_unknown_bits=lambda: bmp(2, 2, 7, b"\x80" * 24),
    bmp_of_odd_fields=lambda: bmp(2, 1, 16, b"\x12\x34" * 2, compression=3, palette=b"\1\2\3\4" * 3),
    bmp_with_a_jpeg_inside=lambda: bmp(60, 40, 24, jpeg(), compression=4),
    bmp_with_a_header_of_4_gigabytes=lambda: b"BM" + b"\0" * 12 + b"\xff" * 100,
)

add(
    200,
    tiff_of_big_endian=lambda: strip(4, 4, b"\x80" * 16, order=">"),
    tiff_of_64_bits=lambda: tiff(grey_tags(1, 1, (273, LONG, 1, 16), (279, LONG, 1, 1)), big=True),
    tiff_tiled=lambda: tiled(10, 16, zlib.compress(b"\x80" * 256)),
    tiff_of_one_plane_a_colour=lambda: strip(
        4, 2, b"\x80" * 24, (262, SHORT, 1, 2), (258, SHORT, 3, b"\x08\0" * 3), (277, SHORT, 1, 3), (284, SHORT, 1, 2),
        (273, LONG, 3, struct.pack("<III", 1000, 1008, 1016)), (279, LONG, 3, struct.pack("<III", 8, 8, 8)),
    ),
    tiff_of_many_pages=of_mode("RGB", "TIFF", save_all=True, append_images=[SMALL.rotate(90)]),
    tiff_that_goes_in_circles=lambda: tiff(grey_tags(4, 4, (273, LONG, 1, 8), (279, LONG, 1, 16)), following=8),
    tiff_lab=lambda: saved(Image.new("LAB", (9, 9), (99, 9, 9)), "TIFF"),
    tiff_ycbcr=of_mode("YCbCr", "TIFF"),
    tiff_of_white_zeros=lambda: strip(4, 4, b"\x80" * 16, (262, SHORT, 1, 0)),
    tiff_with_palette=of_mode("P", "TIFF"),
    tiff_of_infinite_floats=of_values(np.array([[np.nan, np.inf], [-np.inf, 1]], np.float32)),
    tiff_of_nothing_but_nan=of_values(np.full((9, 9), np.nan, np.float32)),
    tiff_of_the_greatest_floats=of_values(np.array([[3e38, -3e38], [0, 1]], np.float32)),
    tiff_of_32_bits=of_values(RAMP.astype(np.int32) * 2**25),
    tiff_of_equal_values=of_values(np.full((9, 9), 7, np.int32)),
    tiff_with_an_orientation_of_9=lambda: strip(4, 4, b"\x80" * 16, (274, SHORT, 1, 9)),
    tiff_without_a_length_of_its_strip=lambda: tiff(grey_tags(4, 4, (273, LONG, 1, 8))),
    tiff_whose_camera_is_not_there=lambda: strip(4, 4, b"\x80" * 16, (40965, LONG, 1, 2**31), (34665, LONG, 1, 2**31)),
    tiff_with_a_strip_of_all_rows=lambda: strip(4, 4, b"\x80" * 16, (278, LONG, 1, 2**32 - 1)),
    **{
        f"tiff_{name}": of_mode(mode, "TIFF", compression=name)
        for name, mode in (
            ("tiff_lzw", "RGB"), ("tiff_adobe_deflate", "RGB"), ("packbits", "RGB"), ("jpeg", "RGB"), ("zstd", "RGB"),
            ("group4", "1"), ("group3", "1"), ("tiff_deflate", "L"), ("lzma", "L"),
        )
    },
)  # fmt: skip
add(
    400,
    tiff_of_zero_width=lambda: strip(0, 4, b"\x80" * 16),
    tiff_without_a_size=lambda: tiff([(258, SHORT, 1, 8)]),
    tiff_of_an_unknown_compression=lambda: strip(4, 4, b"\x80" * 16, compression=4242),
    tiff_of_an_unknown_mode=lambda: strip(4, 4, b"\x80" * 16, (262, SHORT, 1, 77)),
    tiff_whose_strip_is_not_there=lambda: strip(4, 4, b"\x80" * 16, (273, LONG, 1, 2**31)),
    tiff_whose_directory_is_not_there=lambda: b"II*\0\xff\xff\xff\x7f" + b"\0" * 99,
    tiff_whose_directory_is_its_header=lambda: b"II*\0\0\0\0\0" + b"\0" * 99,
)

add(
    200,
    webp_lossy=of_mode("RGB", "WEBP", quality=1),
    webp_lossless=of_mode("RGB", "WEBP", lossless=True),
    webp_with_alpha=of_mode("RGBA", "WEBP"),
    webp_animated=of_mode("RGB", "WEBP", save_all=True, append_images=[SMALL.rotate(90)]),
    webp_with_everything=of_mode("RGB", "WEBP", icc_profile=b"x" * 99, exif=tiff([(0x0112, SHORT, 1, 6)]), xmp=b"<x/>"),
    webp_with_an_exif_of_rubbish=of_mode("RGB", "WEBP", exif=b"\xee" * 99),
)
add(
    400,
    webp_without_a_chunk=riff,
    webp_of_a_canvas_without_pixels=lambda: riff(webp_canvas(4, 4)),
    webp_animated_without_a_frame=lambda: riff(webp_canvas(4, 4, 2), (b"ANIM", b"\0" * 6)),
    webp_with_a_frame_outside_of_its_canvas=lambda: riff(
        webp_canvas(4, 4, 2), (b"ANIM", b"\0" * 6),
        (b"ANMF", b"\xff" * 6 + b"\x3b\0\0\x27\0\0\0\0\0\0" + saved(SMALL, "WEBP", lossless=True)[12:]),
    ),
    webp_with_a_chunk_of_4_gigabytes=lambda: replaced(saved(SMALL, "WEBP"), b"VP8", 4, b"\xff" * 4),
)  # fmt: skip

ALPHA = full_box(b"auxC", 0, b"urn:mpeg:hevc:2015:auxid:1\0")
for form, ending in (("HEIF", "heic"), ("AVIF", "avif")):
    add(200, **{f"{ending}_of_{w}x{h}": of_mode("RGB", form, (w, h)) for w, h in ((1, 1), (1, 200), (3000, 1))})
    add(200, **{f"{ending}_of_{mode}": of_mode(mode, form) for mode in ("L", "LA", "RGBA")})
    add(400, **{f"{ending}_cut_at_{share}": partial(cut, of_mode("RGB", form), share) for share in (10, 50, 90)})
add(
    200,
    heic_put_together=lambda: heif(heic_item()),
    heic_of_four_tiles=lambda: heif(
        (b"grid", [ispe(128, 128)], grid(2, 2, 128, 128)), heic_item(), links=[(b"dimg", 1, [2, 2, 2, 2])]
    ),
    heic_with_an_exif_of_rubbish=lambda: heif(
        heic_item(), (b"Exif", list[bytes](), b"\xee" * 99), links=[(b"cdsc", 2, [1])]
    ),
    heic_with_an_exif_of_2_megabytes=of_mode("RGB", "HEIF", exif=b"Exif\0\0" + b"\xee" * 2_000_000),
    heic_with_xmp=of_mode("RGB", "HEIF", xmp=b"<x/>" * 99),
    heic_with_an_unknown_box=lambda: heif(heic_item(), more=box(b"what", b"x" * 99)),
    heic_with_a_map_of_depths_in_jpeg=lambda: heif(
        heic_item(), (b"jpeg", [ispe(60, 40), full_box(b"auxC", 0, b"urn:com:apple:depth\0")], jpeg()),
        links=[(b"auxl", 2, [1])],
    ),
    avif_put_together=lambda: heif(avif_item(), brand=b"avif"),
    avif_with_an_exif_of_rubbish=lambda: heif(
        avif_item(), (b"Exif", list[bytes](), b"\xee" * 99), links=[(b"cdsc", 2, [1])], brand=b"avif"
    ),
    avif_animated=of_mode("RGB", "AVIF", speed=10, save_all=True, append_images=[SMALL.rotate(90)]),
)  # fmt: skip
add(
    400,
    heic_of_nothing=heif,
    heic_without_boxes=lambda: box(b"ftyp", b"heic\0\0\0\0heic"),
    heic_without_a_size=lambda: heif((b"hvc1", [coded("HEIC")[0]], coded("HEIC")[1])),
    heic_without_a_header_of_its_codec=lambda: heif((b"hvc1", [ispe(60, 40)], coded("HEIC")[1])),
    heic_whose_primary_image_is_not_there=lambda: heif(heic_item(), primary=7),
    heic_with_two_sets_of_boxes=lambda: heif(heic_item()) * 2,
    heic_of_an_overlay=lambda: heif((b"iovl", [ispe(60, 40)], b"\0" * 30), heic_item(), links=[(b"dimg", 1, [2])]),
    heic_made_of_itself=lambda: heif((b"iden", [ispe(60, 40)], b""), links=[(b"dimg", 1, [1])]),
    heic_of_jpeg=lambda: heif((b"jpeg", [ispe(60, 40)], jpeg())),
    heic_of_uncompressed_pixels=lambda: heif((b"unci", [ispe(60, 40)], b"\0" * 9999)),
    heic_with_a_grid_of_another_number_of_tiles=lambda: heif(
        (b"grid", [ispe(120, 80)], grid(2, 2, 120, 80)), heic_item(), links=[(b"dimg", 1, [2])]
    ),
    heic_of_a_film=lambda: box(b"ftyp", b"hevc\0\0\0\0hevcmsf1") + box(b"moov", box(b"mvhd", b"\0" * 100)),
    avif_of_a_film=lambda: box(b"ftyp", b"avis\0\0\0\0avis") + box(b"moov", box(b"mvhd", b"\0" * 100)),
    mp4=lambda: box(b"ftyp", b"isom\0\0\0\0mp42") + box(b"moov", b"\0" * 100),
)  # fmt: skip

add(
    400,
    nothing=lambda: b"",
    one_byte=lambda: b"\x89",
    svg=lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>',
    html=lambda: b"<!doctype html><title>x</title>",
    pdf=lambda: b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    eps=lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    eps_from_dos=lambda: b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIIIH", 30, 99, 0, 0, 0, 0, 65535) + b"%!PS-Adobe-3.0\n",
    zip_of_nothing=lambda: b"PK\5\6" + b"\0" * 18,
    elf=lambda: b"\x7fELF\2\1\1" + b"\0" * 99,
    python_pickle=lambda: b"\x80\4cos\nsystem\n.",
    ico=of_mode("RGBA", "ICO", (32, 32)),
    ppm=of_mode("RGB", "PPM"),
    tga=of_mode("RGB", "TGA"),
    jpeg_2000=of_mode("RGB", "JPEG2000"),
    psd=lambda: b"8BPS\0\1" + b"\0" * 6 + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + b"\0" * 99,
    a_script_with_an_image_behind=lambda: b"<?php system(1); ?>" + jpeg(),
)
add(200, an_image_with_a_script_behind=lambda: saved(SMALL, "GIF") + b"<?php system(1); ?>")


# Bombs

BOMBS: dict[str, Callable[[], bytes]] = {}
# Those that have their pixels all the same: what is too much of them is left alone.
ANSWERED = {
    "apng_of_10000_frames", "avif_of_10000_frames", "gif_of_10000_frames",
    "gif_with_8_megabytes_of_codes_for_16_pixels",
    "jpeg_with_a_profile_of_8_megabytes", "png_with_an_exif_of_8_megabytes", "png_with_a_profile_of_a_gigabyte",
    "png_with_300_profiles", "png_with_300_texts", "png_with_texts_in_four_bytes_a_letter",
    "png_with_300_texts_that_are_broken", "png_with_300_texts_behind_its_pixels", "png_with_a_text_of_a_gigabyte",
    "tiff_of_10000_frames", "tiff_with_a_million_resolutions",
    "tiff_that_claims_4_billion_values", "tiff_that_points_to_itself", "tiff_whose_camera_has_a_million_values",
    "tiff_whose_strip_is_larger_than_it", "tiff_with_a_profile_of_8_megabytes", "webp_of_10000_frames",
    "webp_with_a_profile_of_8_megabytes", "webp_with_an_exif_of_8_megabytes",
}  # fmt: skip


def bomb(function: Callable[[], bytes]) -> Callable[[], bytes]:
    BOMBS[function.__name__] = function
    return function


@bomb
def png_of_50000() -> bytes:
    return png(header(CLAIM, CLAIM), rows=b"\0" * 2**20)


@bomb
def gif_of_50000() -> bytes:
    return gif(CLAIM, CLAIM, frame(0, 0, 4, 4))


@bomb
def gif_frame_larger_than_its_screen() -> bytes:
    return gif(4, 4, frame(0, 0, CLAIM, CLAIM))


@bomb
def gif_frame_far_outside_of_its_screen() -> bytes:
    return gif(4, 4, frame(65535, 65535, 4, 4))


@bomb
def webp_lossless_of_16383() -> bytes:
    return riff((b"VP8L", b"\x2f" + struct.pack("<I", 0x3FFE | 0x3FFE << 14) + b"\0" * 20))


@bomb
def webp_lossy_of_16383() -> bytes:
    return riff((b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383) + b"\0" * 20))


@bomb
def webp_canvas_of_16_million() -> bytes:
    return riff(webp_canvas(2**24, 200), (b"VP8L", b"\x2f" + b"\0" * 20))


@bomb
def webp_canvas_just_below_pillow_s_limit() -> bytes:
    """Of twice MAX_IMAGE_PIXELS: Pillow only warns, and makes its decoder."""
    inner = saved(SMALL, "WEBP", lossless=True)[12:]
    placed = b"\0" * 6 + struct.pack("<I", 59)[:3] + struct.pack("<I", 39)[:3] + b"\0\0\0\0"
    return riff(webp_canvas(9999, 9999, 2), (b"ANIM", b"\0" * 6), (b"ANMF", placed + inner))


@bomb
def bmp_of_50000() -> bytes:
    return bmp(CLAIM, CLAIM, 24, b"\0" * 1000)


@bomb
def bmp_of_2_billion() -> bytes:
    return bmp(2**31 - 1, 2**31 - 1, 32, b"\0" * 1000)


@bomb
def tiff_of_50000() -> bytes:
    return strip(CLAIM, CLAIM, zlib.compress(b"\0" * 2**20), compression=8)


@bomb
def jpeg_of_50000() -> bytes:
    at = jpeg().index(b"\xff\xc0") + 5
    return jpeg()[:at] + struct.pack(">HH", CLAIM, CLAIM) + jpeg()[at + 4 :]


@bomb
def jpeg_of_16000_progressive() -> bytes:
    """Its coefficients would take 770 MB, at whatever scale it is decoded."""
    whole = jpeg(progressive=True)
    at = whole.index(b"\xff\xc2") + 5
    return whole[:at] + struct.pack(">HH", 16_000, 16_000) + whole[at + 4 :]


@bomb
def heic_of_50000() -> bytes:
    return heif(heic_item(ispe(CLAIM, CLAIM)))


@bomb
def avif_of_50000() -> bytes:
    return heif(avif_item(ispe(CLAIM, CLAIM)), brand=b"avif")


@bomb
def heic_whose_codec_says_16000() -> bytes:
    """What the boxes say is small."""
    return heif(heic_item(header=hevc_of(16_000, 16_000)))


@bomb
def heic_whose_pixels_say_16000() -> bytes:
    """They bring a header of the codec of their own."""
    header = hevc_of(16_000, 16_000)
    at = header.index(b"\x42\1")
    [size] = struct.unpack_from(">H", header, at - 2)
    unit = struct.pack(">I", size) + header[at : at + size]
    return heif(heic_item(pixels=unit + coded("HEIC")[1]))


@bomb
def avif_whose_codec_says_16000() -> bytes:
    return heif(avif_item(pixels=av1_of(16_000, 16_000)), brand=b"avif")


@bomb
def heic_whose_alpha_is_of_16000() -> bytes:
    alpha = heic_item(ispe(60, 40), ALPHA, header=hevc_of(16_000, 16_000))
    return heif(heic_item(), alpha, links=[(b"auxl", 2, [1])])


@bomb
def heic_grid_of_50000() -> bytes:
    """Its boxes say less than its own data."""
    return heif((b"grid", [ispe(60, 40)], grid(1, 1, CLAIM, CLAIM)), heic_item(), links=[(b"dimg", 1, [2])])


@bomb
def heic_grid_of_65536_times_the_same_tile() -> bytes:
    links = [(b"dimg", 1, [2] * 65_535)]
    return heif((b"grid", [ispe(256, 256)], grid(256, 256, 256, 256)), heic_item(), links=links)


@bomb
def heic_grid_of_large_tiles() -> bytes:
    """Of each of which a corner is seen."""
    tile = heic_item(ispe(7000, 7000), header=hevc_of(7000, 7000))
    return heif((b"grid", [ispe(900, 900)], grid(30, 30, 900, 900)), tile, links=[(b"dimg", 1, [2] * 900)])


@bomb
def heic_grid_of_grids() -> bytes:
    nested = [(b"grid", [ispe(600, 600)], grid(10, 10, 600, 600)) for _ in range(6)]
    return heif(*nested, heic_item(), links=[(b"dimg", i, [i + 1] * 100) for i in range(1, 7)])


@bomb
def heic_of_60000_items() -> bytes:
    return heif(heic_item(), *[(b"Exif", list[bytes](), b"")] * 60_000)


@bomb
def heic_of_a_million_boxes() -> bytes:
    return heif(heic_item(), more=box(b"free") * 1_000_000)


@bomb
def heic_of_a_million_extents() -> bytes:
    places = struct.pack(">HHH", 1, 0, 65_535) + struct.pack(">II", 0, 1000) * 65_535
    return heif(heic_item()).replace(b"iloc", b"free", 1) + full_box(b"iloc", 0, b"\x44\0\0\1", places * 15)


@bomb
def heic_of_boxes_in_boxes() -> bytes:
    data = b""
    for _ in range(100_000):
        data = b"".join((struct.pack(">I", len(data) + 12), b"iref\0\0\0\0", data[:5000]))
    return heif(heic_item(), more=data)


@bomb
def heic_of_a_million_pieces_of_pixels() -> bytes:
    return heif(heic_item(pixels=b"\0\0\0\1\x4e" * 1_000_000))


@bomb
def avif_of_a_million_pieces_of_pixels() -> bytes:
    return heif(avif_item(pixels=b"\x12\0" * 4_000_000), brand=b"avif")


@bomb
def avif_of_10000_frames() -> bytes:
    """Of a film of which only the first image is read."""
    data = saved(SMALL, "AVIF", speed=10, save_all=True, append_images=[SMALL.rotate(90)])
    at = data.index(b"stsz") + 12
    return data[:at] + struct.pack(">I", 2**31) + data[at + 4 :]


@bomb
def gif_of_10000_frames() -> bytes:
    return gif(4, 4, frame(0, 0, 4, 4) * 10_000, b";")


@bomb
def webp_of_10000_frames() -> bytes:
    inner = saved(Image.new("RGB", (4, 4)), "WEBP", lossless=True)[12:]
    one = (b"ANMF", b"\0" * 6 + b"\3\0\0\3\0\0" + b"\x0a\0\0\0" + inner)
    return riff(webp_canvas(4, 4, 2), (b"ANIM", b"\0" * 6), *[one] * 10_000)


@bomb
def apng_of_10000_frames() -> bytes:
    data = zlib.compress((b"\0" + b"\x80" * 12) * 4)
    control = struct.pack(">IIIIHHBB", 4, 4, 0, 0, 1, 10, 0, 0)
    frames = [
        chunk(b"fcTL", struct.pack(">I", 2 * i - 1) + control) + chunk(b"fdAT", struct.pack(">I", 2 * i) + data)
        for i in range(1, 10_000)
    ]
    first = chunk(b"fcTL", struct.pack(">I", 0) + control) + chunk(b"IDAT", data)
    return png(header(4, 4), chunk(b"acTL", struct.pack(">II", 10_000, 0)), first, *frames)


@bomb
def tiff_of_10000_frames() -> bytes:
    """Directories in a row, each pointing to the next."""
    one = strip(4, 4, b"\x80" * 16)[8:]
    at = [8 + i * len(one) for i in range(10_001)]
    next_at = 2 + 8 * 12
    parts = [one[:next_at] + struct.pack("<I", at[i + 1]) + one[next_at + 4 :] for i in range(10_000)]
    return b"II*\0" + struct.pack("<I", 8) + b"".join(parts)


@bomb
def tiff_that_points_to_itself() -> bytes:
    return tiff(grey_tags(4, 4, (273, LONG, 1, 8), (279, LONG, 1, 16)), following=8)


@bomb
def png_with_a_profile_of_a_gigabyte() -> bytes:
    return rgb_png(chunk(b"iCCP", b"x\0\0" + zeros(2**30)))


@bomb
def png_with_300_profiles() -> bytes:
    return rgb_png(chunk(b"iCCP", b"x\0\0" + zeros(2**20)) * 300)


@bomb
def png_with_300_texts() -> bytes:
    return rgb_png(b"".join(chunk(b"zTXt", b"%d\0\0" % i + zeros(2**20)) for i in range(300)))


@bomb
def png_with_texts_in_four_bytes_a_letter() -> bytes:
    text = zlib.compress(b"\xf0\x9f\x98\x80" + b"a" * (2**20 - 4))
    return rgb_png(b"".join(chunk(b"iTXt", b"%d\0\1\0\0\0" % i + text) for i in range(99)))


@bomb
def png_with_300_texts_that_are_broken() -> bytes:
    """Nothing of them is kept, so nothing of them counts as memory: only as time."""
    return rgb_png(chunk(b"zTXt", b"x\0\0" + zeros(2**20)[:-1] + b"x") * 300)


@bomb
def png_with_300_texts_behind_its_pixels() -> bytes:
    return rgb_png(after=chunk(b"zTXt", b"x\0\0" + zeros(2**20)[:-1] + b"x") * 300)


@bomb
def png_with_a_text_of_a_gigabyte() -> bytes:
    return rgb_png(chunk(b"iTXt", b"x\0\1\0\0\0" + zeros(2**30)))


@bomb
def png_with_a_million_empty_chunks() -> bytes:
    return rgb_png(chunk(b"teSt") * 1_000_000)


@bomb
def png_with_a_million_pieces_of_pixels() -> bytes:
    return rgb_png(chunk(b"IDAT") * 1_000_000)


@bomb
def png_with_a_chunk_of_4_gigabytes() -> bytes:
    return rgb_png(chunk(b"tEXt", b"x\0" + b"y" * 1000, length=2**32 - 1))


@bomb
def png_with_an_exif_of_8_megabytes() -> bytes:
    """Its orientation has four million values."""
    exif = tiff([(0x0112, SHORT, 4_000_000, b"\0" * 8_000_000)])
    return rgb_png(chunk(b"eXIf", exif))


@bomb
def webp_with_an_exif_of_8_megabytes() -> bytes:
    exif = tiff([(0x0112, SHORT, 4_000_000, b"\0" * 8_000_000)])
    inner = saved(SMALL, "WEBP", lossless=True)[12:]
    return riff(webp_canvas(60, 40, 8), (inner[:4], inner[8:]), (b"EXIF", exif))


@bomb
def webp_with_a_profile_of_8_megabytes() -> bytes:
    inner = saved(SMALL, "WEBP", lossless=True)[12:]
    return riff(webp_canvas(60, 40, 32), (b"ICCP", b"\0" * 8_000_000), (inner[:4], inner[8:]))


@bomb
def jpeg_with_a_profile_of_8_megabytes() -> bytes:
    return jpeg_with(*(segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 122]) + b"\0" * 65_000) for i in range(1, 123)))


@bomb
def tiff_with_a_profile_of_8_megabytes() -> bytes:
    return strip(4, 4, b"\x80" * 16, (34675, 7, 8_000_000, b"\0" * 8_000_000))


@bomb
def jpeg_with_an_exif_of_100000_pieces() -> bytes:
    return jpeg_with(segment(0xE1, b"Exif\0\0" + b"x" * 60) * 100_000)


@bomb
def jpeg_with_an_exif_hidden_behind_an_end() -> bytes:
    """Pillow goes on behind a marker that ends the image, as long as there was no scan."""
    return jpeg_with(b"\xff\xd9", segment(0xE1, b"Exif\0\0" + b"x" * 60) * 100_000)


@bomb
def jpeg_with_an_exif_hidden_in_an_extension() -> bytes:
    """Pillow does not skip over the data of this marker."""
    return jpeg_with((b"\xff\xc8\xff\xff" + segment(0xE1, b"Exif\0\0" + b"x" * 60) * 885) * 100)


@bomb
def jpeg_with_4_million_bytes_of_rubbish() -> bytes:
    return jpeg_with(segment(0xFE, b""), b"\0" * 4_000_000)


@bomb
def jpeg_with_4_million_bytes_of_padding() -> bytes:
    return jpeg_with(segment(0xFE, b""), b"\xff" * 4_000_000)


@bomb
def jpeg_with_a_million_empty_comments() -> bytes:
    return jpeg_with(segment(0xFE, b"") * 1_000_000)


@bomb
def jpeg_with_500_frame_headers() -> bytes:
    """Pillow keeps a tuple of each three bytes."""
    return jpeg_with(segment(0xC0, b"\x08\0\x08\0\x08\3" + b"\x01\x11\0" * 21_800) * 200)


@bomb
def jpeg_with_many_quantisation_tables() -> bytes:
    return jpeg_with(segment(0xDB, (b"\0" + b"\1" * 64) * 1000) * 200)


@bomb
def jpeg_with_500_scans() -> bytes:
    """Of 2000 x 2000 pixels, all of them in the first scan's place."""
    whole = saved(Image.new("L", (2000, 2000)), "JPEG", progressive=True)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + scan * 500 + b"\xff\xd9"


@bomb
def jpeg_with_an_empty_scan_500_times() -> bytes:
    whole = saved(Image.new("L", (7000, 7000)), "JPEG", progressive=True)
    return whole[:-2] + segment(0xDA, b"\1\1\0\1\5\0") * 500 + b"\xff\xd9"


@bomb
def gif_with_a_million_empty_comments() -> bytes:
    return gif(4, 4, b"!\xfe\0" * 1_000_000, frame(0, 0, 4, 4), b";")


@bomb
def gif_with_8_megabytes_of_codes_for_16_pixels() -> bytes:
    return gif(4, 4, frame(0, 0, 4, 4, b"\x02" + (b"\xff" + b"\x44" * 255) * 32_000 + b"\0"), b";")


@bomb
def bmp_of_run_lengths() -> bytes:
    return bmp(7000, 7000, 4, (b"\xfa\x12" * 28 + b"\0\0") * 7000, compression=2, palette=GREYS)


@bomb
def bmp_of_line_ends() -> bytes:
    """Pillow fills each line byte by byte."""
    return bmp(7000, 7000, 8, b"\1\1\0\0" * 7000, compression=1, palette=GREYS)


@bomb
def bmp_with_a_palette_of_2_billion() -> bytes:
    return bmp(4, 4, 8, b"\0" * 16).replace(b"\0" * 8 + b"\0" * 16, b"\xff\xff\xff\x7f" + b"\0" * 20)


@bomb
def tiff_whose_tile_is_larger_than_it() -> bytes:
    return tiled(10, 30_000, zlib.compress(b"x"))


@bomb
def tiff_whose_tile_is_of_a_type_that_only_libtiff_reads() -> bytes:
    return tiled(10, 30_000, zlib.compress(b"x"), kind=SLONG8)


@bomb
def tiff_with_two_widths_of_its_tile() -> bytes:
    tags = grey_tags(10, 10, (323, LONG, 1, 30_000), (324, LONG, 1, 1000), (325, LONG, 1, 9), compression=8)
    return tiff([*tags, (322, SHORT, 1, 30_000), (322, LONG, 1, 16)]).ljust(1000, b"\0") + zlib.compress(b"x")


@bomb
def tiff_whose_tile_is_a_text() -> bytes:
    """A text times a number is a long text."""
    tags = grey_tags(10, 10, (322, 2, 4, b"abcd"), (323, LONG, 1, 2**30), (324, LONG, 1, 1000), compression=8)
    return tiff(tags).ljust(1100, b"\0")


@bomb
def tiff_whose_strip_is_larger_than_it() -> bytes:
    return strip(10, 10, zlib.compress(b"\0" * 2**26), (278, LONG, 1, 2**26), compression=8)


@bomb
def tiff_whose_strip_claims_2_gigabytes() -> bytes:
    return strip(10, 10, zlib.compress(b"\0" * 100), (279, LONG, 1, 2**31), compression=8)


@bomb
def tiff_of_40_million_strips() -> bytes:
    return strip(1, 40_000_000, zlib.compress(b"\0"), (278, LONG, 1, 1), compression=8)


@bomb
def tiff_with_a_million_offsets() -> bytes:
    return tiff(grey_tags(2, 2, (278, LONG, 1, 1), (273, LONG, 1_000_000, b"\0" * 4_000_000)))


@bomb
def tiff_with_a_million_offsets_of_a_byte() -> bytes:
    return tiff(grey_tags(2, 2, (278, LONG, 1, 1), (273, 1, 1_000_000, b"\0" * 1_000_000)))


@bomb
def tiff_with_a_million_resolutions() -> bytes:
    return strip(4, 4, b"\x80" * 16, (282, RATIONAL, 1_000_000, b"\0" * 8_000_000))


@bomb
def tiff_whose_camera_has_a_million_values() -> bytes:
    """Its EXIF lies in a directory of its own."""
    inner = struct.pack("<HHHII", 1, 0x9204, RATIONAL, 1_000_000, 2000) + b"\0\0\0\0"
    whole = strip(4, 4, b"\x80" * 16, (34665, LONG, 1, 1500)).ljust(1500, b"\0") + inner
    return whole.ljust(2000, b"\0") + b"\0" * 8_000_000


@bomb
def tiff_that_claims_4_billion_values() -> bytes:
    return strip(4, 4, b"\x80" * 16, (34675, 7, 2**32 - 1, b"\0" * 1000))


@bomb
def tiff_of_60000_tags() -> bytes:
    return tiff([*grey_tags(4, 4), *((1000 + i, LONG, 1, i) for i in range(60_000))])


@bomb
def bigtiff_of_18_quintillion_tags() -> bytes:
    whole = tiff(grey_tags(4, 4), big=True)
    return whole[:16] + b"\xff" * 8 + whole[24:] + b"\x01\0" * 4_000_000


@bomb
def png_of_one_row_of_3_million() -> bytes:
    return png(header(3_000_000, 1, 1, 0), rows=b"\0" * 375_001)


@bomb
def png_of_one_column_of_33_million() -> bytes:
    return png(header(1, 33_000_000), rows=b"\0\0\0\0")


def zeros(size: int) -> bytes:
    """So many zeros, packed, without ever having them all."""
    packer = zlib.compressobj(9)
    block = bytes(min(size, 2**20))
    return b"".join(packer.compress(block) for _ in range(size // len(block))) + packer.flush()
