"""What a HEIC or AVIF file may ask of its library: the same as image_checks.py has it for the other formats.

Both are boxes within boxes (ISO 14496-12 and 23008-12). The size of the image is written at several places, and what
counts in the end is what the codec's own header says. So all of them are read here, of everything that the primary
image is made of: its tiles, where it is a grid of them, and its alpha. All else in the file is never decoded.
"""

import struct
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from web.image_checks import Bomb, TooManyPixels, without

# Limits, all far above what phones write.
MAX_BOXES = 20_000  # and extents, references and properties: each costs a microsecond or two
MAX_DEPTH = 6  # of boxes in boxes, on the way to the properties
MAX_ITEMS = 1_000  # images, tiles and metadata; libheif has the same limit. A photo of 200 megapixels has 768 tiles
MAX_UNITS = 20_000  # NAL units or OBUs in all tiles: mostly one in each
MAX_LINKS = 4  # from the primary image to its tiles and their alpha
MOST_DECODED = 2.5  # pixels of tiles and alpha for each pixel of the limit

CONTAINERS = {b"meta", b"iprp", b"ipco", b"iinf", b"iref"}  # whose boxes are looked into
FULL_BOXES = {b"meta": 4, b"iref": 4}  # bytes ahead of the boxes inside
ONCE = (
    b"ftyp",
    b"meta",
    b"pitm",
    b"iinf",
    b"iloc",
    b"iref",
    b"iprp",
    b"ipco",
)  # each reader could take another
METADATA_ITEMS = (b"Exif", b"mime", b"uri ")
CODECS = {b"hvc1": "HEIC", b"av01": "AVIF"}
FILMS = {b"avis": b"avif", b"msf1": b"mif1", b"hevc": b"heic", b"hevx": b"heix", b"hevm": b"heim", b"hevs": b"heis"}
ALPHA = (b"auxid:1", b"auxiliary:alpha")  # in the name of what is auxiliary to an image: only these are decoded
SEQUENCE_PARAMETERS = 33  # a NAL unit of HEVC
SEQUENCE_HEADER = 1  # an OBU of AV1


class Box(NamedTuple):
    """A part of the file: its kind, where its kind is written, and where what it says begins and ends."""

    kind: bytes
    kind_at: int
    body: int
    end: int


class Bits:
    """The bits of some bytes, one after the other. Raises IndexError behind the last."""

    def __init__(self, data: bytes) -> None:
        self.bits = "".join(f"{byte:08b}" for byte in data)
        self.at = 0

    def take(self, count: int) -> int:
        """Return the next `count` bits as a number."""
        self.at += count
        if self.at > len(self.bits):
            raise IndexError("a codec's header is cut off")
        return int(self.bits[self.at - count : self.at] or "0", 2)

    def golomb(self) -> int:
        """Return the next number in Exp-Golomb coding."""
        zeros = self.bits.index("1", self.at) - self.at
        if zeros > 32:
            raise IndexError("a number of more than 32 bits")
        return self.take(2 * zeros + 1) - 1


class Heif:
    """The items of a HEIC or AVIF file. Raises Bomb, and IndexError, KeyError, ValueError or struct.error at damage."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.left, self.left_units = MAX_BOXES, MAX_UNITS
        self.found = defaultdict[bytes, list[Box]](list)
        self.properties: list[Box] = []
        self.walk(0, len(data), MAX_DEPTH)
        for kind in ONCE:
            if len(self.found[kind]) > 1:
                raise Bomb(f"two boxes {kind!r}")
        self.types = self.read_types()
        self.owned = self.read_properties()
        self.made_of, self.alphas = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
        self.read_links()
        self.extents = dict(self.read_extents())
        [pitm] = self.found[b"pitm"]
        self.primary = self.number(pitm.body + 4, 4 if data[pitm.body] else 2)

    def number(self, at: int, size: int) -> int:
        """Return the number of `size` bytes at `at`."""
        if at + size > len(self.data):
            raise IndexError("a box is cut off")
        return int.from_bytes(self.data[at : at + size], "big")

    def count(self, parts: int) -> None:
        """Raise Bomb when all parts of the file together are too many."""
        self.left -= parts
        if self.left < 0:
            raise Bomb("too many boxes")

    def boxes(self, at: int, end: int) -> Iterator[Box]:
        """Yield the boxes from `at` to `end`. Raises Bomb at too many."""
        while at + 8 <= end:
            self.count(1)
            size, body = self.number(at, 4), at + 8
            if size == 1:
                size, body = self.number(at + 8, 8), at + 16
            size = size or end - at
            if size < body - at:
                raise ValueError("a box is smaller than its own header")
            yield Box(self.data[at + 4 : at + 8], at + 4, body, min(at + size, end))
            at += size

    def walk(self, at: int, end: int, depth: int) -> None:
        """Note the boxes from `at` to `end`, and those inside."""
        for box in self.boxes(at, end):
            self.found[box.kind].append(box)
            if box.kind in CONTAINERS and depth:
                ahead = FULL_BOXES.get(box.kind, 0)
                if box.kind == b"iinf":
                    ahead = 8 if self.data[box.body] else 6
                if box.kind == b"ipco":
                    self.properties = list(self.boxes(box.body, box.end))
                else:
                    self.walk(box.body + ahead, box.end, depth - 1)

    def read_types(self) -> dict[int, bytes]:
        """Return the type of each item. Raises Bomb at too many items."""
        types = dict[int, bytes]()
        for box in self.found[b"infe"]:
            item, at = self.item_type(box)
            if item in types or len(types) == MAX_ITEMS:
                raise Bomb("too many items")
            types[item] = self.data[at : at + 4]
        return types

    def item_type(self, box: Box) -> tuple[int, int]:
        """Return the id of an item, and where its type is written."""
        size = 4 if self.data[box.body] >= 3 else 2
        return self.number(box.body + 4, size), box.body + 4 + size + 2

    def read_links(self) -> None:
        """Note of each item what it is made of, each as often as it is, and what is its alpha."""
        for iref in self.found[b"iref"]:
            size = 4 if self.data[iref.body] else 2
            for box in self.boxes(iref.body + 4, iref.end):
                count, start = self.number(box.body + size, 2), box.body + size + 2
                self.count(count)
                source = self.number(box.body, size)
                targets = [self.number(start + i * size, size) for i in range(count)]
                if box.kind == b"dimg":
                    self.made_of[source] += targets
                elif box.kind == b"auxl" and self.is_alpha(source):
                    for target in set(targets):
                        self.alphas[target].append(source)

    def is_alpha(self, item: int) -> bool:
        """Whether an item is the alpha of another: there are maps of depths and the like too."""
        names = [self.data[box.body + 4 : box.end] for box in self.owned[item] if box.kind == b"auxC"]
        return any(alpha in name for name in names for alpha in ALPHA)

    def read_properties(self) -> dict[int, list[Box]]:
        """Return the properties of each item."""
        owned = defaultdict[int, list[Box]](list)
        for ipma in self.found[b"ipma"]:
            size, wide = 4 if self.data[ipma.body] else 2, self.data[ipma.body + 3] & 1
            at = ipma.body + 8
            for _ in range(self.number(ipma.body + 4, 4)):
                if at + size > ipma.end:
                    raise IndexError("properties are cut off")
                item, count = self.number(at, size), self.number(at + size, 1)
                at += size + 1
                self.count(count + 1)
                for _ in range(count):
                    index = self.number(at, 1 + wide) & (0x7FFF if wide else 0x7F)
                    at += 1 + wide
                    owned[item] += self.properties[index - 1 : index] if index else []
        return owned

    def read_extents(self) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Yield the id of each item and where its data lies, as starts and ends."""
        for iloc in self.found[b"iloc"]:
            version, sizes = self.data[iloc.body], self.number(iloc.body + 4, 2)
            offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
            wide = 4 if version == 2 else 2
            at = iloc.body + 6 + wide
            for _ in range(min(self.number(iloc.body + 6, wide), MAX_ITEMS)):
                item, at = self.number(at, wide), at + wide
                method, at = (self.number(at, 2) & 15, at + 2) if version else (0, at)
                base, at = self.number(at + 2, base_size), at + 2 + base_size
                count, at = self.number(at, 2), at + 2
                places = []
                for _ in range(count):
                    at += index_size if version else 0
                    start = base + self.number(at, offset_size)
                    length = self.number(at + offset_size, length_size)
                    at += offset_size + length_size
                    self.count(1)
                    places.append(self.place(method, start, length))
                yield item, places

    def place(self, method: int, start: int, length: int) -> tuple[int, int]:
        """Return where an extent lies in the file. Raises ValueError where that is another item."""
        end = len(self.data)
        if method == 1:
            [idat] = self.found[b"idat"]
            start, end = start + idat.body, idat.end
        elif method:
            raise ValueError("an item inside of another")
        return start, min(end, start + length if length else end)

    def content(self, item: int) -> bytes:
        """Return the data of an item. Raises Bomb where its extents overlap to more than the file."""
        places = self.extents[item]
        if sum(max(0, end - start) for start, end in places) > len(self.data):
            raise Bomb("extents that overlap")
        return b"".join(self.data[start:end] for start, end in places)

    def parts(self) -> list[int]:
        """Return the primary image and all that is decoded for it, each as often as it is. Raises Bomb at too many."""
        found, front = list[int](), [self.primary]
        for _ in range(MAX_LINKS):
            found += front
            front = [part for item in front for part in [*self.made_of[item], *self.alphas[item]]]
            if len(found) + len(front) > MAX_ITEMS:
                raise Bomb("too many tiles")
            if not front:
                return found
        raise Bomb("images made of images made of images")

    def canvas(self, item: int) -> tuple[int, int]:
        """Return the width and height that are claimed for an item: the largest of several claims."""
        sizes = [struct.unpack_from(">II", self.data, box.body + 4) for box in self.owned[item] if box.kind == b"ispe"]
        if not sizes:
            raise ValueError("an image without a size")
        if self.types[item] == b"grid":
            grid = self.content(item)
            sizes.append(struct.unpack_from(">II" if grid[1] & 1 else ">HH", grid, 4))
            if (grid[2] + 1) * (grid[3] + 1) != len(self.made_of[item]):
                raise ValueError("a grid with another number of tiles")
        return max(width for width, _ in sizes), max(height for _, height in sizes)

    def coded(self, item: int) -> list[tuple[int, int]]:
        """Return the sizes that the codec's own headers of an item have, of which the decoder takes one."""
        if self.types[item] == b"hvc1":
            return [hevc_size(unit) for unit in self.hevc_headers(item)]
        return [size for header in self.av1_headers(item) for size in av1_sizes(header)]

    def hevc_headers(self, item: int) -> list[bytes]:
        """Return the sequence parameter sets of an HEVC item: those of its properties and those among its pixels."""
        found = []
        for box in self.owned[item]:
            if box.kind != b"hvcC":
                continue
            at = box.body + 23
            for _ in range(self.data[box.body + 22]):
                count, at = self.number(at + 1, 2), at + 3
                self.count(count)
                for _ in range(count):
                    size = self.number(at, 2)
                    found.append(self.data[at + 2 : at + 2 + size])
                    at += 2 + size
                    if at > box.end:
                        raise IndexError("a codec's header is cut off")
            found += self.units(self.content(item), (self.data[box.body + 21] & 3) + 1)
        headers = [unit for unit in found if unit and unit[0] >> 1 & 63 == SEQUENCE_PARAMETERS]
        if not headers:
            raise ValueError("no header of the codec")
        return headers

    def units(self, content: bytes, length_size: int) -> Iterator[bytes]:
        """Yield the first bytes of each NAL unit of an item."""
        at = 0
        while at + length_size < len(content):
            self.count_unit()
            size = int.from_bytes(content[at : at + length_size], "big")
            at += length_size
            yield content[at : at + min(size, 1000)]
            at += size

    def av1_headers(self, item: int) -> list[bytes]:
        """Return the sequence headers of an AV1 item: those among its pixels and those of its properties."""
        configured = [self.data[box.body + 4 : box.end] for box in self.owned[item] if box.kind == b"av1C"]
        found = [header for content in [*configured, self.content(item)] for header in self.obus(content)]
        if not found:
            raise ValueError("no header of the codec")
        return found

    def obus(self, content: bytes) -> Iterator[bytes]:
        """Yield the sequence headers among some OBUs."""
        at = 0
        while at < len(content):
            self.count_unit()
            kind, extended, sized = content[at] >> 3 & 15, content[at] & 4, content[at] & 2
            at += 2 if extended else 1
            size, shift = 0 if sized else len(content) - at, 0
            while sized:
                size |= (content[at] & 127) << shift
                at, shift = at + 1, shift + 7
                if content[at - 1] < 128 or shift > 56:
                    break
            if kind == SEQUENCE_HEADER:
                yield content[at : at + min(size, 1000)]
            at += size

    def count_unit(self) -> None:
        """Raise Bomb at too many units."""
        self.left_units -= 1
        if self.left_units < 0:
            raise Bomb("too many units of the codec")


@lru_cache(maxsize=8)  # all tiles of a grid have the same
def hevc_size(unit: bytes) -> tuple[int, int]:
    """Return the width and height in a sequence parameter set of HEVC (H.265, 7.3.2.2)."""
    bits = Bits(unit[:200].replace(b"\0\0\3", b"\0\0"))
    bits.take(16 + 4)
    layers = bits.take(3)
    bits.take(1 + 88 + 8)  # the profile and the level of the whole
    present = [(bits.take(1), bits.take(1)) for _ in range(layers)]
    bits.take(2 * (8 - layers) if layers else 0)
    for profile, level in present:
        bits.take(88 * profile + 8 * level)
    bits.golomb()  # its id
    if bits.golomb() == 3:  # chroma in full
        bits.take(1)
    return bits.golomb(), bits.golomb()


def av1_sizes(header: bytes) -> list[tuple[int, int]]:
    """Return the largest width and height that a sequence header of AV1 allows (AV1, 5.5.1)."""
    bits = Bits(header[:200])
    bits.take(3 + 1)
    if bits.take(1):  # a still picture, whose frame has the sequence's size
        bits.take(5)
        still = True
    else:
        skip_operating_points(bits)
        still = False
    width_bits, height_bits = bits.take(4) + 1, bits.take(4) + 1
    width, height = bits.take(width_bits) + 1, bits.take(height_bits) + 1
    # Else a frame may have another size of as many bits, and the decoder does not compare them. An encoder takes no
    # more bits than it needs, so a frame is at most four times as large.
    return [(width, height)] if still else [(width, height), (2 ** (width_bits - 1), 2 ** (height_bits - 1))]


def skip_operating_points(bits: Bits) -> None:
    """Go on behind what a sequence header of AV1 says of time and of operating points."""
    decoder_model, delay_bits = 0, 0
    if bits.take(1):  # how long a frame is shown
        bits.take(64)
        if bits.take(1):  # all the same
            zeros = bits.bits.index("1", bits.at) - bits.at
            bits.take(2 * zeros + 1)
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


def heif_pixels(data: bytes, max_pixels: int) -> tuple[bytes, str]:
    """Return the file without metadata and films, and which of CODECS its primary image is in.

    Raises Bomb, TooManyPixels, and ValueError and its kin where the file is damaged or is neither HEIC nor AVIF.
    """
    file = Heif(data)
    parts = file.parts()
    codecs = {file.types[item] for item in parts} - {b"grid", b"iden"}
    if len(codecs) != 1 or not codecs <= CODECS.keys():
        raise ValueError(f"items of the types {sorted(codecs)}")
    decoded = 0
    for item in parts:
        sizes = [file.canvas(item)]
        if file.types[item] in CODECS:
            sizes += file.coded(item)
            decoded += max(width * height for width, height in sizes)
        if any(width * height > max_pixels for width, height in sizes):
            raise TooManyPixels
    if decoded > MOST_DECODED * max_pixels:
        raise TooManyPixels
    return without(data, [], hidden(file)), CODECS[codecs.pop()]


def hidden(file: Heif) -> dict[int, bytes]:
    """Return the changes that make a library pass over metadata, whose orientation does not count, and over films."""
    changes = {box.kind_at: b"free" for box in file.found[b"moov"]}
    for box in file.found[b"ftyp"]:
        brands = [at for at in range(box.body, box.end - 3, 4) if file.data[at : at + 4] in FILMS]
        changes |= {at: FILMS[file.data[at : at + 4]] for at in brands}
    for box in file.found[b"infe"]:
        _, at = file.item_type(box)
        if file.data[at : at + 4] in METADATA_ITEMS:
            changes[at] = b"none"
    return changes
