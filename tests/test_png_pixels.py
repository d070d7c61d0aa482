"""PNG files decoded by kornia-rs give Pillow's pixels, and Pillow decodes what kornia-rs can't."""

import io
import logging
import os
import sys
import zlib
from random import Random

import numpy as np
import pytest
import samples
from hostile.mutations import MUTATIONS
from hostile.png import ROWS, chunk, header, make_png, png_with
from hostile.tiff import ORIENTATION, SHORT, make_tiff
from PIL import Image
from samples import colors, saved

from helpers import Pixels, ServiceError
from web import png_pixels
from web.image_preparation import open_image, prepare_image
from web.png_pixels import decode_png

MUTANTS = int(os.environ.get("FUZZ_EXAMPLES", "3000"))
EXIF = chunk(b"eXIf", make_tiff([(ORIENTATION, SHORT, 1, 6)]))


def with_filter(kind: int, color: int, channels: int) -> bytes:
    """A PNG of random bytes whose rows all have this filter."""
    rows = np.random.default_rng(kind).integers(0, 256, (9, 1 + 13 * channels), dtype=np.uint8)
    rows[:, 0] = kind
    return make_png(header(13, 9, 8, color), rows=rows.tobytes())


PLAIN = {
    **{f"{mode} {w} x {h}": saved(Image.fromarray(colors(3, (w, h))).convert(mode), "PNG")
       for mode in ("L", "RGB", "RGBA") for w, h in ((1, 1), (1, 40), (301, 7), (97, 61))},
    **{f"filter {kind}, {channels} channels": with_filter(kind, color, channels)
       for kind in range(5) for color, channels in ((0, 1), (2, 3), (6, 4))},
    "RGB with EXIF": make_png(header(4, 4), EXIF, rows=ROWS),
    "many small chunks": make_png(header(4, 4), *[chunk(b"IDAT", bytes([byte])) for byte in zlib.compress(ROWS)]),
    "stored": saved(Image.fromarray(colors(3)), "PNG", compress_level=0),
    "text and a profile, which are cut out": png_with(chunk(b"tEXt", b"a\0b"), chunk(b"iCCP", b"x\0\0rubbish")),
}  # fmt: skip
OTHER = {
    "1 bit": saved(Image.fromarray(colors(1)).convert("1"), "PNG"),
    "2 bits": make_png(header(8, 2, 2, 0), rows=b"\0\x1b\x1b" * 2),
    "16 bits": saved(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)), "PNG"),
    "16 bits, RGB": make_png(header(2, 2, 16, 2), rows=(b"\0" + b"\x80\1" * 6) * 2),
    "gray with alpha": saved(Image.fromarray(colors(1)).convert("LA"), "PNG"),
    "palette": saved(Image.fromarray(colors(1)).quantize(32), "PNG"),
    "interlaced": make_png(header(1, 1, interlace=1), rows=b"\0abc"),
    "one color transparent": saved(Image.fromarray(colors(1)), "PNG", transparency=(1, 2, 3)),
    "animated": saved(Image.fromarray(colors(1)), "PNG", save_all=True, append_images=[Image.new("RGB", (60, 40))]),
    "EXIF after the pixels": png_with(after=EXIF),
    "too few rows": make_png(header(4, 400), rows=b"\0" * 13),
    "a wrong checksum of a chunk": png_with()[:-14] + b"!!" + png_with()[-12:],
    "no end": make_png(header(4, 4), rows=ROWS, end=b""),
}


def opened(data: bytes) -> Image.Image:
    return open_image(io.BytesIO(data))


def by_pillow(data: bytes) -> Pixels:
    image = opened(data)
    image.load()
    return np.asarray(image).reshape(image.height, image.width, -1)


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_png_has_the_pixels_that_pillow_decodes(name: str) -> None:
    decoded = decode_png(opened(PLAIN[name]))

    assert decoded is not None
    assert np.array_equal(decoded, by_pillow(PLAIN[name]))


@pytest.mark.parametrize("name", OTHER)
def test_pillow_decodes_every_other_png(name: str) -> None:
    assert decode_png(opened(OTHER[name])) is None


def test_a_very_large_png_is_left_to_pillow_which_does_not_block_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png_pixels, "MAX_PIXELS", 97 * 61 - 1)

    assert decode_png(opened(PLAIN["RGB 97 x 61"])) is None
    assert decode_png(opened(PLAIN["RGB 301 x 7"])) is not None


def test_the_orientation_of_a_plain_png_is_applied() -> None:
    rgb = colors(2)
    exif = Image.Exif()
    exif[0x0112] = 8

    prepared = prepare_image(opened(saved(Image.fromarray(rgb), "PNG", exif=exif)), rgb.shape[:2])

    assert np.array_equal(prepared, np.rot90(rgb))


@pytest.mark.parametrize("seed", range(10))
def test_mutated_png_files_have_the_pixels_that_pillow_decodes(seed: int) -> None:
    """FUZZ_EXAMPLES=50000 tests more of them."""
    plain = list(PLAIN.values())
    decoded = 0
    for number in range(seed, MUTANTS, 10):
        random = Random(number)
        data = random.choice(plain)
        for mutate in random.choices(MUTATIONS, k=random.randint(1, 3)):
            data = mutate(data, random)
        decoded += is_decoded_alike(data, number)

    assert decoded > MUTANTS / 300


def is_decoded_alike(data: bytes, number: int) -> bool:
    """Return whether kornia-rs decodes this file; if so, Pillow must decode the same pixels."""
    try:
        pixels = decode_png(opened(data))
    except ServiceError:
        return False
    if pixels is None:
        return False
    try:
        expected = by_pillow(data)
    except OSError:
        # The only difference: Pillow refuses a file if its chunks have the right checksums, but the stream in them not.
        assert has_wrong_stream(data), f"mutant {number}"
        return True
    assert np.array_equal(pixels, expected), f"mutant {number}"
    return True


def has_wrong_stream(data: bytes) -> bool:
    inflating, at = zlib.decompressobj(), 8
    try:
        while at + 12 <= len(data):
            length = int.from_bytes(data[at : at + 4], "big")
            if data[at + 4 : at + 8] == b"IDAT":
                inflating.decompress(data[at + 8 : at + 8 + length])
            at += 12 + length
    except zlib.error:
        return True
    return not inflating.eof


@pytest.mark.slow("decompresses a gigabyte")
def test_a_stream_that_goes_on_for_a_gigabyte_is_not_decompressed() -> None:
    compressing = zlib.compressobj(9)
    stream = b"".join(compressing.compress(bytes(2**20)) for _ in range(1024)) + compressing.flush()

    decoded = decode_png(opened(make_png(header(4, 4), chunk(b"IDAT", stream))))

    assert decoded is not None
    assert not decoded.any()


class Broken:
    def decode_image_png_u8(self, *args: object) -> Pixels:
        return np.zeros((7, 5, 3), np.uint8)


@pytest.mark.parametrize("library", [None, Broken()], ids=["missing", "wrong"])
def test_pillow_decodes_if_the_library_is_missing_or_wrong(
    library: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "kornia_rs.io", library)
    monkeypatch.setattr("kornia_rs.io", library)
    png_pixels.png_library.cache_clear()
    try:
        prepared = [prepare_image(opened(PLAIN["RGB 97 x 61"]), (97, 61)) for _ in range(2)]
    finally:
        png_pixels.png_library.cache_clear()

    assert np.array_equal(prepared[0], colors(3, (97, 61)))
    [warning] = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert "Pillow decodes PNG files, which takes longer" in warning.message


class PanicException(BaseException):
    """What a panic in Rust raises."""


def test_pillow_decodes_a_file_at_which_the_library_panics(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Broken()

    def panic(*args: object) -> Pixels:
        raise PanicException

    monkeypatch.setattr(library, "decode_image_png_u8", panic, raising=False)
    monkeypatch.setattr(png_pixels, "png_library", lambda: library)

    assert np.array_equal(prepare_image(opened(PLAIN["RGB 97 x 61"]), (97, 61)), colors(3, (97, 61)))


def test_each_sample_that_is_a_plain_png_takes_the_fast_path() -> None:
    fast = [each.name for each in samples.samples() if decode_png(opened(each.data)) is not None]

    assert fast == ["png", "png_with_alpha"]
