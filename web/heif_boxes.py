"""Read the boxes of a HEIC or AVIF file (ISO 14496-12 and 23008-12): its items, their properties, links and data."""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from web.image_checks import Bomb

# Limits, all far above what phones write.
MAX_BOXES = 20_000  # plus extents, references and properties; each costs a microsecond or two
MAX_DEPTH = 6  # of nested boxes
MAX_ITEMS = 1_000  # images, tiles and metadata; libheif has the same limit. A photo of 200 megapixels has 768 tiles

CONTAINERS = {b"meta", b"iprp", b"ipco", b"iinf", b"iref"}
FULL_BOXES = {b"meta": 4, b"iref": 4}  # bytes before the inner boxes
# If a file has two boxes of one of these kinds, this module and the decoder might read different ones.
UNIQUE = (b"ftyp", b"meta", b"pitm", b"iinf", b"iloc", b"iref", b"iprp", b"ipco")
ALPHA = (b"auxid:1", b"auxiliary:alpha")  # occur in the type of an auxiliary image that is an alpha


class Box(NamedTuple):
    """A part of the file: its kind, and the offsets of the kind, the content and the end."""

    kind: bytes
    kind_at: int
    body: int
    end: int


class Budget:
    """Limits how many parts of one sort a file may have."""

    def __init__(self, limit: int, parts: str) -> None:
        self.left, self.parts = limit, parts

    def spend(self, count: int = 1) -> None:
        """Count `count` more parts. Raises Bomb if there are too many."""
        self.left -= count
        if self.left < 0:
            raise Bomb(f"too many {self.parts}")


class HeifFile:
    """The items of a HEIC or AVIF file. Raises Bomb; IndexError, KeyError, ValueError or struct.error if damaged."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.budget = Budget(MAX_BOXES, "boxes")
        self.found = defaultdict[bytes, list[Box]](list)
        self.properties: list[Box] = []
        self.walk(0, len(data), MAX_DEPTH)
        for kind in UNIQUE:
            if len(self.found[kind]) > 1:
                raise Bomb(f"two boxes {kind!r}")
        self.types = self.read_types()
        self.owned = self.read_properties()
        self.derived_from, self.alphas = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
        self.read_links()
        self.extents = dict(self.read_extents())
        [pitm] = self.found[b"pitm"]
        self.primary = self.number(pitm.body + 4, 4 if data[pitm.body] else 2)

    def number(self, at: int, size: int) -> int:
        """Return the big-endian number in the `size` bytes at `at`."""
        if at + size > len(self.data):
            raise IndexError("a box is cut off")
        return int.from_bytes(self.data[at : at + size], "big")

    def boxes(self, at: int, end: int) -> Iterator[Box]:
        """Yield the boxes from `at` to `end`, without their inner boxes."""
        while at + 8 <= end:
            self.budget.spend()
            size, body = self.number(at, 4), at + 8
            if size == 1:
                size, body = self.number(at + 8, 8), at + 16
            size = size or end - at
            if size < body - at:
                raise ValueError("a box is smaller than its own header")
            yield Box(self.data[at + 4 : at + 8], at + 4, body, min(at + size, end))
            at += size

    def walk(self, at: int, end: int, depth: int) -> None:
        """Collect the boxes from `at` to `end`, with their inner boxes."""
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
        """Return the type of each item. Raises Bomb if there are too many items or two with the same id."""
        types = dict[int, bytes]()
        for box in self.found[b"infe"]:
            item, at = self.item_type(box)
            if item in types or len(types) == MAX_ITEMS:
                raise Bomb("too many items")
            types[item] = self.data[at : at + 4]
        return types

    def item_type(self, box: Box) -> tuple[int, int]:
        """Return the id of an item and the offset of its type."""
        size = 4 if self.data[box.body] >= 3 else 2
        return self.number(box.body + 4, size), box.body + 4 + size + 2

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
                self.budget.spend(count + 1)
                for _ in range(count):
                    index = self.number(at, 1 + wide) & (0x7FFF if wide else 0x7F)
                    at += 1 + wide
                    owned[item] += self.properties[index - 1 : index] if index else []
        return owned

    def read_links(self) -> None:
        """Collect which items each item is derived from, repeated ones included, and its alphas."""
        for iref in self.found[b"iref"]:
            size = 4 if self.data[iref.body] else 2
            for box in self.boxes(iref.body + 4, iref.end):
                count, start = self.number(box.body + size, 2), box.body + size + 2
                self.budget.spend(count)
                source = self.number(box.body, size)
                targets = [self.number(start + i * size, size) for i in range(count)]
                if box.kind == b"dimg":
                    self.derived_from[source] += targets
                elif box.kind == b"auxl" and self.is_alpha(source):
                    for target in set(targets):
                        self.alphas[target].append(source)

    def is_alpha(self, item: int) -> bool:
        """Return whether an auxiliary image is an alpha, not a depth map or the like."""
        types = [self.data[box.body + 4 : box.end] for box in self.owned[item] if box.kind == b"auxC"]
        return any(alpha in each for each in types for alpha in ALPHA)

    def read_extents(self) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Yield the id of each item, and the (start, end) offsets of its data."""
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
                extents = []
                for _ in range(count):
                    at += index_size if version else 0
                    start = base + self.number(at, offset_size)
                    length = self.number(at + offset_size, length_size)
                    at += offset_size + length_size
                    self.budget.spend()
                    extents.append(self.extent(method, start, length))
                yield item, extents

    def extent(self, method: int, start: int, length: int) -> tuple[int, int]:
        """Return the (start, end) offsets of an extent. Raises ValueError if it lies within another item."""
        end = len(self.data)
        if method == 1:
            [idat] = self.found[b"idat"]
            start, end = start + idat.body, idat.end
        elif method:
            raise ValueError("an item inside another")
        return start, min(end, start + length if length else end)

    def content(self, item: int) -> bytes:
        """Return the data of an item. Raises Bomb if its extents have more bytes in sum than the file."""
        extents = self.extents[item]
        if sum(max(0, end - start) for start, end in extents) > len(self.data):
            raise Bomb("extents that overlap")
        return b"".join(self.data[start:end] for start, end in extents)
