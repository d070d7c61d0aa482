"""Remove metadata from PNG, WebP, GIF and TIFF files, and refuse those that cost too much to read.

A file of a few bytes can cost Pillow gigabytes or minutes, mostly because of metadata, and a classifier needs only the
EXIF orientation. So metadata is cut out before Pillow sees the file. This also accepts photos whose profiles or texts
are broken or very large. jpeg_checks.py and heif_checks.py do the same for other formats.
"""

import struct
import zlib

# Limits, all far above what cameras and editors write.
MAX_CHUNKS = 50_000  # in a PNG or WebP
MAX_GIF_BLOCKS = 200_000  # before the first frame: 50 MB of comments
MAX_TIFF_TAGS = 4096
MAX_TAG_VALUES = 65_536  # in one tag of a TIFF, such as the offsets of its strips
MAX_TILE_PIXELS = 2**20  # in a TIFF's tile that is larger than the image
MAX_EXIF_BYTES = 2**20

PNG_ANIMATION = {b"acTL", b"fcTL"}  # kept once, and only before the pixels: they give the first frame's position
PNG_ONCE = {b"eXIf", *PNG_ANIMATION}
WEBP_FRAMES = (b"ANMF", b"VP8 ", b"VP8L")
WEBP_PIXELS = (b"VP8X", b"ANIM", b"ALPH", *WEBP_FRAMES)
WEBP_PROFILE, WEBP_EXIF, WEBP_XMP = 0x20, 0x08, 0x04  # flags in VP8X
GIF_EXTENSION, GIF_CONTROL = 0x21, 0xF9
BIG_TIFF = 43
TIFF_SIZES = (256, 257, 322, 323)  # width and height of the image and of a tile
TIFF_OFFSETS = (273, 324)  # of strips and of tiles
# The tags that affect pixels; all others are metadata.
TIFF_PIXELS = {*range(254, 267), 273, 274, 277, 278, 279, 284, *range(290, 294), 317, 320, 322, 323, 324, 325, 330, 332,
               338, 339, 347, *range(512, 522), *range(529, 533)}  # fmt: skip
TIFF_INTEGERS = {3: "H", 4: "I", 16: "Q"}  # types of a tag
TIFF_BYTES = (1, 2, 7)  # types whose values Pillow keeps as bytes


class Bomb(Exception):
    """Reading the file would cost too much; the text is for the log."""


class TooManyPixels(Exception):
    """The image has more pixels than the limit."""


def edit(data: bytes, cuts: list[tuple[int, int]], patches: dict[int, bytes] | None = None) -> bytes:
    """Return `data` without the ranges (start, end) in `cuts`, and with the bytes at each offset in `patches` replaced.

    Cuts and patches must not overlap. The data is copied at most once.
    """
    changes = [(start, end, b"") for start, end in cuts]
    changes += [(at, at + len(new), new) for at, new in (patches or {}).items()]
    if not changes:
        return data
    view, pieces, kept = memoryview(data), list[bytes | memoryview](), 0
    for start, end, new in sorted(changes):
        pieces += [view[kept:start], new]
        kept = end
    return b"".join([*pieces, view[kept:]])


def strip_png(data: bytes) -> tuple[bytes, list[bytes]]:
    """Return the PNG with only its pixels and its EXIF, if that is small, and its kinds of chunks in their order.

    Raises Bomb if it has too many chunks.
    """
    at, cuts, seen, kinds = 8, list[tuple[int, int]](), set[bytes](), [b""]
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            return edit(data, cuts), kinds[1:]
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind == b"IEND":
            return edit(data, [*cuts, (min(end, len(data)), len(data))]), [*kinds[1:], kind]
        wanted = kind in PNG_ONCE and kind not in seen and length <= MAX_EXIF_BYTES and has_valid_crc(data, at, end)
        is_optional = kind[0] & 0x20 and kind.isalpha()
        if is_optional and not wanted and kind != b"tRNS":
            cuts.append((at, min(end, len(data))))
        elif kind != kinds[-1]:
            kinds.append(kind)
        seen |= PNG_ANIMATION if kind == b"IDAT" else {kind}
        at = end
    raise Bomb("too many PNG chunks")


def has_valid_crc(data: bytes, start: int, end: int) -> bool:
    """Return whether the checksum of a PNG chunk matches its content."""
    return data[end - 4 : end] == struct.pack(">I", zlib.crc32(memoryview(data)[start + 4 : end - 4]))


def strip_webp(data: bytes) -> bytes:
    """Return the WebP with only its first frame and its EXIF, if that is small."""
    at, pieces, header = 12, list[bytes | memoryview](), None
    view, has_frame, missing = memoryview(data), False, WEBP_PROFILE | WEBP_XMP | WEBP_EXIF
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            break
        kind, length = struct.unpack_from("<4sI", data, at)
        end = at + 8 + length + length % 2
        is_exif = kind == b"EXIF" and length <= MAX_EXIF_BYTES and end <= len(data) and missing & WEBP_EXIF
        if (kind in WEBP_PIXELS and not has_frame) or is_exif:
            if at + 8 + length > len(data):
                return data  # cut off, which libwebp reports
            header = len(pieces) if kind == b"VP8X" and header is None else header
            has_frame = has_frame or kind in WEBP_FRAMES
            missing &= ~WEBP_EXIF if is_exif else 0xFF
            pieces.append(view[at:end] if end <= len(data) else data[at:] + b"\0")
        at = end
    if header is not None and len(pieces[header]) >= 9:
        changed = bytearray(pieces[header])
        changed[8] &= ~missing
        pieces[header] = bytes(changed)
    return b"".join([b"RIFF", struct.pack("<I", 4 + sum(map(len, pieces))), b"WEBP", *pieces])


def strip_gif(data: bytes) -> bytes:
    """Return the GIF without the comments and the like before its first frame. Raises Bomb at too many blocks."""
    if len(data) < 13:
        return data
    at = 13 + (3 * (2 << (data[10] & 7)) if data[10] & 0x80 else 0)
    cuts, blocks = list[tuple[int, int]](), 0
    while at + 2 < len(data) and data[at] == GIF_EXTENSION:
        start, label = at, data[at + 1]
        at += 2
        while at < len(data) and data[at] and blocks < MAX_GIF_BLOCKS:
            at += data[at] + 1
            blocks += 1
        at += 1
        blocks += 10  # an extension costs as much as ten blocks
        if blocks > MAX_GIF_BLOCKS:
            raise Bomb("too many GIF blocks")
        if label != GIF_CONTROL:
            cuts.append((start, min(at, len(data))))
    return edit(data, cuts)


def strip_tiff(data: bytes) -> bytes:
    """Return the TIFF with each large metadata tag reduced to one byte.

    Raises Bomb if a tag has very many values, since Pillow makes an object of each (the offsets in one upload could
    take ten gigabytes), or if a tile is much larger than the image, since libtiff allocates the whole tile (a file of
    134 bytes can claim two gigabytes).
    """
    order = "<" if data.startswith(b"II") else ">"
    big = data[2 if order == "<" else 3] == BIG_TIFF
    [at] = struct.unpack_from(order + "Q" if big else order + "I", data, 8 if big else 4)
    [tags] = struct.unpack_from(order + "Q" if big else order + "H", data, at)
    entry = struct.Struct(order + "HHQ8s" if big else order + "HHI4s")
    at += 8 if big else 2
    sizes, patches = dict.fromkeys(TIFF_SIZES, 0), dict[int, bytes]()
    if tags > MAX_TIFF_TAGS:
        raise Bomb(f"{tags} TIFF tags")
    entries = memoryview(data)[at : at + tags * entry.size]
    for tag, kind, count, value in entry.iter_unpack(entries[: len(entries) // entry.size * entry.size]):
        if count > MAX_TAG_VALUES and tag not in TIFF_PIXELS:
            patches[at] = entry.pack(tag, 1, 1, b"")
        elif count > MAX_TAG_VALUES and (kind not in TIFF_BYTES or tag in TIFF_OFFSETS):
            raise Bomb(f"{count} values in TIFF tag {tag}")
        if tag in sizes:
            # If a file has such a tag twice, this module and the decoder might read different ones.
            if count != 1 or kind not in TIFF_INTEGERS or sizes[tag]:
                raise Bomb(f"invalid TIFF tag {tag}")
            [sizes[tag]] = struct.unpack_from(order + TIFF_INTEGERS[kind], value)
        at += entry.size
    width, height, tile_width, tile_height = sizes.values()
    if tile_width * tile_height > max(width * height, MAX_TILE_PIXELS):
        raise Bomb("a TIFF tile much larger than the image")
    return edit(data, [], patches)
