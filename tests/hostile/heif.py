"""Write the boxes of HEIC and AVIF files, and the headers of their codecs."""

import struct
from collections.abc import Iterable
from functools import cache

from samples import saved

from hostile.parts import SMALL

Item = tuple[bytes, list[bytes], bytes]  # its type, its properties and its data
Link = tuple[bytes, int, list[int]]  # a reference from an item to others


def box(kind: bytes, *content: bytes, size: int | None = None) -> bytes:
    """A box, optionally with a wrong size."""
    data = b"".join(content)
    return struct.pack(">I", len(data) + 8 if size is None else size) + kind + data


def full_box(kind: bytes, version: int, *content: bytes, flags: int = 0) -> bytes:
    return box(kind, bytes([version]), struct.pack(">I", flags)[1:], *content)


def make_heif(*items: Item, links: Iterable[Link] = (), brand: bytes = b"heic", primary: int = 1,
              more: bytes = b"") -> bytes:  # fmt: skip
    """A HEIC or AVIF of these items, numbered from 1, with `more` boxes after the others."""
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
    """The property with the size of an image."""
    return full_box(b"ispe", 0, struct.pack(">II", width, height))


def grid(rows: int, columns: int, width: int, height: int) -> Item:
    """An image of tiles."""
    return b"grid", [ispe(width, height)], grid_data(rows, columns, width, height)


def grid_data(rows: int, columns: int, width: int, height: int) -> bytes:
    return bytes([0, 1, rows - 1, columns - 1]) + struct.pack(">II", width, height)


@cache
def coded(form: str) -> tuple[bytes, bytes]:
    """The codec's header (hvcC or av1C) and the pixels of SMALL, in HEIC or AVIF."""
    data = saved(SMALL, "HEIF", chroma=420) if form == "HEIC" else saved(SMALL, "AVIF", speed=10)
    kind = b"hvcC" if form == "HEIC" else b"av1C"
    at = data.index(kind) - 4
    [size] = struct.unpack_from(">I", data, at)
    return data[at : at + size], data[data.index(b"mdat") + 4 :]


def heic_item(*properties: bytes, pixels: bytes | None = None, header: bytes | None = None) -> Item:
    own, data = coded("HEIC")
    # libx265 pads SMALL to 64 x 64 pixels.
    return b"hvc1", [header or own, *(properties or [ispe(64, 64)])], pixels or data


def avif_item(*properties: bytes, pixels: bytes | None = None) -> Item:
    own, data = coded("AVIF")
    depth = full_box(b"pixi", 0, b"\3\x08\x08\x08")
    return b"av01", [own, depth, *(properties or [ispe(60, 40)])], pixels or data


def golomb(number: int) -> str:
    """The bits of a number in Exp-Golomb coding."""
    digits = f"{number + 1:b}"
    return "0" * (len(digits) - 1) + digits


def as_bytes(bits: str) -> bytes:
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")


def hevc_header(width: int, height: int) -> bytes:
    """The codec's header (hvcC) of SMALL, with another size in its sequence parameter set."""
    header, _ = coded("HEIC")
    at = header.index(b"\x42\1")
    [size] = struct.unpack_from(">H", header, at - 2)
    bits = "".join(f"{byte:08b}" for byte in header[at : at + size].replace(b"\0\0\3", b"\0\0"))
    old = golomb(64) + golomb(64)
    assert old in bits, bits
    unit = as_bytes(bits.replace(old, golomb(width) + golomb(height), 1)).replace(b"\0\0", b"\0\0\3")
    return box(b"hvcC", header[8 : at - 2], struct.pack(">H", len(unit)), unit, header[at + size :])


def av1_pixels(width: int, height: int) -> bytes:
    """The pixels of SMALL in AV1, with another size in their sequence header."""
    _, pixels = coded("AVIF")
    at = pixels.index(b"\x0a")
    size = pixels[at + 1]
    bits = "".join(f"{byte:08b}" for byte in pixels[at + 2 : at + 2 + size])
    old = f"{5:04b}{5:04b}{59:06b}{39:06b}"
    assert old in bits, bits
    unit = as_bytes(bits.replace(old, f"{15:04b}{15:04b}{width - 1:016b}{height - 1:016b}", 1))
    return pixels[:at] + bytes([0x0A, len(unit)]) + unit + pixels[at + 2 + size :]


def exif_item(data: bytes = b"") -> Item:
    return b"Exif", [], data


def sequence(brand: bytes, compatible: bytes = b"") -> bytes:
    """A file with an image sequence and no still image."""
    return box(b"ftyp", brand, b"\0\0\0\0", brand, compatible) + box(b"moov", box(b"mvhd", b"\0" * 100))
