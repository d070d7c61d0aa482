"""Hide the metadata of HEIC and AVIF files, and refuse those that cost too much to decode.

Such a file states the size of its image several times, and the decoder believes the codec's header. So all sizes are
checked, of everything that is decoded for the primary image: its tiles if it is a grid, and its alpha.
"""

import struct
from collections.abc import Iterator

from web.codec_headers import SEQUENCE_PARAMETERS, av1_sequence_headers, av1_sizes, hevc_size, nal_units
from web.heif_boxes import MAX_ITEMS, Budget, HeifFile
from web.image_checks import Bomb, TooManyPixels, edit

MAX_UNITS = 20_000  # NAL units or OBUs in all tiles; most tiles have one
MAX_LINKS = 4  # in a chain from the primary image to its tiles and their alphas
MAX_DECODED = 2.5  # times the pixel limit, for all tiles and alphas together

METADATA_ITEMS = (b"Exif", b"mime", b"uri ")
CODECS = {b"hvc1": "HEIC", b"av01": "AVIF"}
# The brands of image sequences, and the brands of still images to put in their place.
BRANDS = {b"avis": b"avif", b"msf1": b"mif1", b"hevc": b"heic", b"hevx": b"heix", b"hevm": b"heim", b"hevs": b"heis"}


def strip_heif(data: bytes, max_pixels: int) -> tuple[bytes, str]:
    """Return the file with metadata and image sequences hidden, and its format: HEIC or AVIF.

    Raises Bomb, TooManyPixels, and the errors of HeifFile if the file is damaged or has another codec.
    """
    file = HeifFile(data)
    items = decoded_items(file)
    codecs = {file.types[item] for item in items} - {b"grid", b"iden"}
    if len(codecs) != 1 or not codecs <= CODECS.keys():
        raise ValueError(f"items of the types {sorted(codecs)}")
    decoded, budget = 0, Budget(MAX_UNITS, "units of the codec")
    for item in items:
        sizes = [canvas_size(file, item)]
        if file.types[item] in CODECS:
            sizes += coded_sizes(file, item, budget)
            decoded += max(width * height for width, height in sizes)
        if any(width * height > max_pixels for width, height in sizes):
            raise TooManyPixels
    if decoded > MAX_DECODED * max_pixels:
        raise TooManyPixels
    return edit(data, [], hiding_patches(file)), CODECS[codecs.pop()]


def decoded_items(file: HeifFile) -> list[int]:
    """Return the primary image and all items decoded for it, with repeats. Raises Bomb if there are too many."""
    found, front = list[int](), [file.primary]
    for _ in range(MAX_LINKS):
        found += front
        front = [part for item in front for part in [*file.derived_from[item], *file.alphas[item]]]
        if len(found) + len(front) > MAX_ITEMS:
            raise Bomb("too many tiles")
        if not front:
            return found
    raise Bomb("images derived from images, nested too deeply")


def canvas_size(file: HeifFile, item: int) -> tuple[int, int]:
    """Return the largest width and height that the boxes state for an item."""
    sizes = [struct.unpack_from(">II", file.data, box.body + 4) for box in file.owned[item] if box.kind == b"ispe"]
    if not sizes:
        raise ValueError("an image without a size")
    if file.types[item] == b"grid":
        grid = file.content(item)
        sizes.append(struct.unpack_from(">II" if grid[1] & 1 else ">HH", grid, 4))
        if (grid[2] + 1) * (grid[3] + 1) != len(file.derived_from[item]):
            raise ValueError("a grid whose number of tiles is wrong")
    return max(width for width, _ in sizes), max(height for _, height in sizes)


def coded_sizes(file: HeifFile, item: int, budget: Budget) -> list[tuple[int, int]]:
    """Return the sizes in all codec headers of an item; the decoder takes one. Raises ValueError if there is none."""
    if file.types[item] == b"hvc1":
        units = [unit for unit in hevc_units(file, item, budget) if unit]
        sizes = [hevc_size(unit) for unit in units if unit[0] >> 1 & 63 == SEQUENCE_PARAMETERS]
    else:
        configured = [file.data[box.body + 4 : box.end] for box in file.owned[item] if box.kind == b"av1C"]
        contents = [*configured, file.content(item)]
        headers = [header for content in contents for header in av1_sequence_headers(content, budget)]
        sizes = [size for header in headers for size in av1_sizes(header)]
    if not sizes:
        raise ValueError("no header of the codec")
    return sizes


def hevc_units(file: HeifFile, item: int, budget: Budget) -> Iterator[bytes]:
    """Yield the NAL units of an HEVC item: those in its properties, then the beginnings of those in its data."""
    for box in file.owned[item]:
        if box.kind != b"hvcC":
            continue
        at = box.body + 23
        for _ in range(file.data[box.body + 22]):
            count, at = file.number(at + 1, 2), at + 3
            file.budget.spend(count)
            for _ in range(count):
                size = file.number(at, 2)
                yield file.data[at + 2 : at + 2 + size]
                at += 2 + size
                if at > box.end:
                    raise IndexError("a codec's header is cut off")
        yield from nal_units(file.content(item), (file.data[box.body + 21] & 3) + 1, budget)


def hiding_patches(file: HeifFile) -> dict[int, bytes]:
    """Return the patches that hide image sequences and metadata, since the orientation in EXIF must not count."""
    patches = {box.kind_at: b"free" for box in file.found[b"moov"]}
    for box in file.found[b"ftyp"]:
        brands = [at for at in range(box.body, box.end - 3, 4) if file.data[at : at + 4] in BRANDS]
        patches |= {at: BRANDS[file.data[at : at + 4]] for at in brands}
    for box in file.found[b"infe"]:
        _, at = file.item_type(box)
        if file.data[at : at + 4] in METADATA_ITEMS:
            patches[at] = b"none"
    return patches
