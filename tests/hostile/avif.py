"""AVIF files."""

import struct

from samples import saved

from hostile.heif import av1_pixels, avif_item, exif_item, ispe, make_heif, sequence
from hostile.parts import CLAIM, SMALL, Maker, replaced, written


def make_avif(*properties: bytes, pixels: bytes | None = None) -> bytes:
    return make_heif(avif_item(*properties, pixels=pixels), brand=b"avif")


def billions_of_frames() -> bytes:
    data = saved(SMALL, "AVIF", speed=10, save_all=True, append_images=[SMALL.rotate(90)])
    return replaced(data, b"stsz", 12, struct.pack(">I", 2**31))


READABLE: dict[str, Maker] = {
    "minimal": make_avif,
    "EXIF of garbage": lambda: make_heif(
        avif_item(), exif_item(b"\xee" * 99), links=[(b"cdsc", 2, [1])], brand=b"avif"
    ),
    "animated": written("RGB", "AVIF", speed=10, save_all=True, append_images=[SMALL.rotate(90)]),
}  # fmt: skip
BROKEN: dict[str, Maker] = {"image sequence only": lambda: sequence(b"avis")}
BOMBS: dict[str, Maker] = {
    "50,000 x 50,000 pixels": lambda: make_avif(ispe(CLAIM, CLAIM)),
    "codec header larger than the boxes say": lambda: make_avif(pixels=av1_pixels(16_000, 16_000)),
    "4 million OBUs": lambda: make_avif(pixels=b"\x12\0" * 4_000_000),
}
HARMLESS_BOMBS: dict[str, Maker] = {"image sequence that claims 2 billion frames": billions_of_frames}
