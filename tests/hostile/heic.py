"""HEIC files."""

import struct

from hostile.heif import (
    box,
    coded,
    exif_item,
    full_box,
    grid,
    grid_data,
    heic_item,
    hevc_header,
    ispe,
    make_heif,
    sequence,
)
from hostile.jpeg import make_jpeg
from hostile.parts import CLAIM, Maker, written

AUXILIARY = b"auxC"
ALPHA = full_box(AUXILIARY, 0, b"urn:mpeg:hevc:2015:auxid:1\0")


def parameter_set(width: int, height: int) -> bytes:
    """The parameters in the codec's header, as a NAL unit that can precede the pixels."""
    header = hevc_header(width, height)
    at = header.index(b"\x42\1")
    [size] = struct.unpack_from(">H", header, at - 2)
    return struct.pack(">I", size) + header[at : at + size]


def nested_grids(levels: int) -> bytes:
    links = [(b"dimg", i, [i + 1] * 100) for i in range(1, levels + 1)]
    return make_heif(*[grid(10, 10, 600, 600)] * levels, heic_item(), links=links)


def million_extents() -> bytes:
    places = struct.pack(">HHH", 1, 0, 65_535) + struct.pack(">II", 0, 1000) * 65_535
    return make_heif(heic_item()).replace(b"iloc", b"free", 1) + full_box(b"iloc", 0, b"\x44\0\0\1", places * 15)


def nested_boxes() -> bytes:
    data = b""
    for _ in range(100_000):
        data = b"".join((struct.pack(">I", len(data) + 12), b"iref\0\0\0\0", data[:5000]))
    return make_heif(heic_item(), more=data)


READABLE: dict[str, Maker] = {
    "minimal": lambda: make_heif(heic_item()),
    "four tiles": lambda: make_heif(grid(2, 2, 128, 128), heic_item(), links=[(b"dimg", 1, [2, 2, 2, 2])]),
    "EXIF of garbage": lambda: make_heif(heic_item(), exif_item(b"\xee" * 99), links=[(b"cdsc", 2, [1])]),
    "EXIF of 2 MB": written("RGB", "HEIC", exif=b"Exif\0\0" + b"\xee" * 2_000_000),
    "XMP": written("RGB", "HEIC", xmp=b"<x/>" * 99),
    "unknown box": lambda: make_heif(heic_item(), more=box(b"what", b"x" * 99)),
    "depth map in JPEG": lambda: make_heif(
        heic_item(), (b"jpeg", [ispe(60, 40), full_box(AUXILIARY, 0, b"urn:com:apple:depth\0")], make_jpeg()),
        links=[(b"auxl", 2, [1])],
    ),
}  # fmt: skip
BROKEN: dict[str, Maker] = {
    "no item": make_heif,
    "no boxes": lambda: box(b"ftyp", b"heic\0\0\0\0heic"),
    "no size": lambda: make_heif((b"hvc1", [coded("HEIC")[0]], coded("HEIC")[1])),
    "no codec header": lambda: make_heif((b"hvc1", [ispe(60, 40)], coded("HEIC")[1])),
    "primary image missing": lambda: make_heif(heic_item(), primary=7),
    "every box twice": lambda: make_heif(heic_item()) * 2,
    "overlay": lambda: make_heif((b"iovl", [ispe(60, 40)], b"\0" * 30), heic_item(), links=[(b"dimg", 1, [2])]),
    "image derived from itself": lambda: make_heif((b"iden", [ispe(60, 40)], b""), links=[(b"dimg", 1, [1])]),
    "coded as JPEG": lambda: make_heif((b"jpeg", [ispe(60, 40)], make_jpeg())),
    "uncompressed pixels": lambda: make_heif((b"unci", [ispe(60, 40)], b"\0" * 9999)),
    "grid with too few tiles": lambda: make_heif(grid(2, 2, 120, 80), heic_item(), links=[(b"dimg", 1, [2])]),
    "image sequence only": lambda: sequence(b"hevc", b"msf1"),
    "MP4": lambda: box(b"ftyp", b"isom\0\0\0\0mp42") + box(b"moov", b"\0" * 100),
}
BOMBS: dict[str, Maker] = {
    "50,000 x 50,000 pixels": lambda: make_heif(heic_item(ispe(CLAIM, CLAIM))),
    "codec header larger than the boxes say": lambda: make_heif(heic_item(header=hevc_header(16_000, 16_000))),
    "second codec header among the pixels": lambda: make_heif(
        heic_item(pixels=parameter_set(16_000, 16_000) + coded("HEIC")[1])
    ),
    "alpha of 16,000 x 16,000 pixels": lambda: make_heif(
        heic_item(), heic_item(ispe(60, 40), ALPHA, header=hevc_header(16_000, 16_000)), links=[(b"auxl", 2, [1])]
    ),
    "grid larger than its box says": lambda: make_heif(
        (b"grid", [ispe(60, 40)], grid_data(1, 1, CLAIM, CLAIM)), heic_item(), links=[(b"dimg", 1, [2])]
    ),
    "grid of 65,535 tiles": lambda: make_heif(
        grid(256, 256, 256, 256), heic_item(), links=[(b"dimg", 1, [2] * 65_535)]
    ),
    "grid of tiles much larger than what they show": lambda: make_heif(
        grid(30, 30, 900, 900), heic_item(ispe(7000, 7000), header=hevc_header(7000, 7000)),
        links=[(b"dimg", 1, [2] * 900)],
    ),
    "six levels of grids": lambda: nested_grids(6),
    "60,000 items": lambda: make_heif(heic_item(), *[exif_item()] * 60_000),
    "a million boxes": lambda: make_heif(heic_item(), more=box(b"free") * 1_000_000),
    "a million extents": million_extents,
    "100,000 nested boxes": nested_boxes,
    "a million NAL units": lambda: make_heif(heic_item(pixels=b"\0\0\0\1\x4e" * 1_000_000)),
}  # fmt: skip
HARMLESS_BOMBS: dict[str, Maker] = {}
