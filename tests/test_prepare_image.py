"""From a client's file to the pixels that the model gets."""

import io
import struct
import zlib
from collections.abc import Callable
from functools import partial

import hostile
import numpy as np
import pytest
import samples
from PIL import Image
from samples import colours, saved

import settings
from helpers import Pixels
from web import image_colors
from web import image_preparation as preparation

TARGET = (224, 224)


def prepare(data: bytes, target: tuple[int, int] = TARGET, channels: int = 3) -> Pixels:
    return preparation.prepare_image(preparation.open_image(io.BytesIO(data)), target, channels)


def resized(pixels: samples.Array, target: tuple[int, int] = TARGET) -> samples.Array:
    return np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.BICUBIC))


@pytest.mark.parametrize("sample", samples.samples(), ids=lambda sample: sample.name)
def test_every_format_and_mode_gives_its_pixels(sample: samples.Sample) -> None:
    prepared = prepare(sample.data)

    assert prepared.shape == (224, 224, 3)
    assert prepared.dtype == np.uint8
    # One level apart: rounding may come before or after the resize.
    assert np.abs(prepared.astype(int) - resized(sample.pixels)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(orientation: int) -> None:
    upright = colours(5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: np.rot90(upright[::-1]), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip

    prepared = prepare(saved(Image.fromarray(np.ascontiguousarray(turned)), "PNG", exif=exif))

    assert np.abs(prepared.astype(int) - resized(upright)).max() <= 1


def test_a_damaged_exif_is_no_reason_to_refuse_a_photo() -> None:
    data = saved(Image.fromarray(colours(1)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xee" * 40)

    assert prepare(data).shape == (224, 224, 3)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_smaller_but_never_below_the_target(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    rgb = colours(3, (2400, 1000))
    data = saved(Image.fromarray(rgb), "JPEG", quality=95, exif=exif)
    image = preparation.open_image(io.BytesIO(data))

    prepared = preparation.prepare_image(image, (200, 380))

    # A half: a quarter would be 250 high, below the 380 that may be asked of it.
    assert image.size == (1200, 500)
    expected = resized(np.rot90(rgb, -1) if orientation == 6 else rgb, (200, 380))
    assert np.abs(prepared.astype(int) - expected).mean() < 2


def test_a_jpeg_just_above_twice_the_target_is_decoded_in_full() -> None:
    rgb = colours(3, (600, 512))
    image = preparation.open_image(io.BytesIO(saved(Image.fromarray(rgb), "JPEG", quality=95)))

    preparation.prepare_image(image, (224, 224))

    # A half, 256 high, would be hardly more than the target: a real photo's probability changed from 0.46 to 0.43.
    assert image.size == (600, 512)


def test_width_and_height_are_not_mixed_up() -> None:
    assert prepare(saved(Image.fromarray(colours(1)), "PNG"), (30, 20)).shape == (20, 30, 3)


def test_grey_and_float_are_made_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "IMAGE_DTYPE", "float32")

    prepared = prepare(saved(Image.fromarray(colours(1)), "PNG"), channels=1)

    assert prepared.shape == (224, 224, 1)
    assert prepared.dtype == np.float32
    assert prepared.max() > 1  # still 0 to 255


def test_the_resampling_filter_is_the_setting_s(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = np.indices((64, 64)).sum(axis=0) % 2 * 255
    data = saved(Image.fromarray(checks.astype(np.uint8)), "PNG")
    assert set(np.unique(prepare(data, (16, 16)))) != {0, 255}

    monkeypatch.setattr(settings, "IMAGE_RESAMPLE", "nearest")

    assert set(np.unique(prepare(data, (16, 16)))) <= {0, 255}


def test_values_that_are_no_numbers_do_not_hide_the_others() -> None:
    values = np.array([[0, 3e38, -3e38], [np.nan, np.inf, -np.inf]], np.float32)

    prepared = prepare(saved(Image.fromarray(values), "TIFF"), (3, 2))

    assert prepared[..., 0].tolist() == [[128, 255, 0], [0, 255, 0]]


# JPEG files without their end


def noisy_jpeg(mode: str, **options: object) -> bytes:
    noise = np.random.default_rng(7).integers(0, 256, (75, 67, 3), dtype=np.uint8)
    return saved(Image.fromarray(noise).convert(mode), "JPEG", quality=90, **options)


JPEGS = {
    "baseline": noisy_jpeg("RGB"),
    "progressive": noisy_jpeg("RGB", progressive=True),
    "grey": noisy_jpeg("L"),
    "progressive grey": noisy_jpeg("L", progressive=True),
    "CMYK": noisy_jpeg("CMYK"),
    "4:2:0": noisy_jpeg("RGB", subsampling="4:2:0"),
    "with restarts": noisy_jpeg("RGB", restart_marker_blocks=2),
    "of one colour": saved(Image.new("RGB", (300, 300), "red"), "JPEG"),
    "with an odd component order": noisy_jpeg("RGB", keep_rgb=True),
}


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_without_its_end_marker_is_read(name: str) -> None:
    whole = JPEGS[name]
    assert whole.endswith(b"\xff\xd9")

    for cut in (1, 2):
        assert np.array_equal(prepare(whole[:-cut]), prepare(whole))


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_without_some_of_its_pixels_is_refused(name: str) -> None:
    whole = JPEGS[name]
    length = len(whole)

    for size in [*range(length - 300, length - 2), *range(2, length - 300, max(1, length // 60))]:
        with pytest.raises(preparation.BadImage):
            prepare(whole[:size])


def test_a_progressive_jpeg_without_its_last_scan_is_refused() -> None:
    whole = JPEGS["progressive"]

    for scan in range(1, whole.count(b"\xff\xda")):
        at = -1
        for _ in range(scan + 1):
            at = whole.index(b"\xff\xda", at + 1)
        with pytest.raises(preparation.BadImage):
            prepare(whole[:at])


@pytest.mark.parametrize("behind", [b"\0" * 5000, b"rubbish" * 99, JPEGS["baseline"]], ids=["zeros", "text", "a film"])
def test_what_stands_behind_a_jpeg_is_left_alone(behind: bytes) -> None:
    assert np.array_equal(prepare(JPEGS["progressive"] + behind), prepare(JPEGS["progressive"]))


# Metadata

MEGABYTES = b"\x9c" * 2_500_000


def png_with(*chunks: bytes) -> bytes:
    return PLAIN_PNG[:33] + b"".join(chunks) + PLAIN_PNG[33:]


def broken_png(kind: bytes) -> bytes:
    chunk = hostile.chunk(kind, b"MM\0*rubbish")
    return png_with(chunk[:-1] + bytes([chunk[-1] ^ 1]))


def packed_png(kind: bytes) -> bytes:
    return png_with(hostile.chunk(kind, b"x\0\0" + zlib.compress(MEGABYTES)))


def jpeg_with(marker: int, start: bytes) -> bytes:
    parts = [hostile.segment(marker, start + MEGABYTES[:60_000]) for _ in range(40)]
    return hostile.jpeg_with(*parts, image=JPEGS["baseline"])


def webp_with(kind: bytes, data: bytes) -> bytes:
    inner = saved(Image.fromarray(colours(8)), "WEBP", lossless=True)[12:]
    [size] = struct.unpack_from("<I", inner, 4)
    return hostile.riff(hostile.webp_canvas(260, 190, 0x2C), (inner[:4], inner[8 : 8 + size]), (kind, data))


def gif_with(label: bytes, *blocks: bytes) -> bytes:
    extension = b"!" + label + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"
    return PLAIN_GIF[: at_gif_frame()] + extension + PLAIN_GIF[at_gif_frame() :]


def at_gif_frame() -> int:
    return 13 + 3 * (2 << (PLAIN_GIF[10] & 7))


def tiff_with(*tags: tuple[int, int, int]) -> bytes:
    """A TIFF with tags of this number, type and count, whose values all lie behind its pixels."""
    more = [(*tag, 1200) for tag in tags]
    return hostile.strip(20, 10, bytes(range(200)) + (MEGABYTES if tags else b""), (279, 4, 1, 200), *more)


PLAIN_PNG = saved(Image.fromarray(colours(8)), "PNG")
PLAIN_GIF = saved(Image.fromarray(colours(8)).quantize(16), "GIF")
# Each with the same picture without it.
METADATA: dict[str, tuple[Callable[[], bytes], Callable[[], bytes]]] = {
    "a PNG's profile of 2.5 MB": (partial(packed_png, b"iCCP"), lambda: PLAIN_PNG),
    "a PNG's packed text of 2.5 MB": (partial(packed_png, b"zTXt"), lambda: PLAIN_PNG),
    "a PNG's XMP of 2.5 MB": (
        lambda: png_with(hostile.chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + MEGABYTES)), lambda: PLAIN_PNG
    ),
    "a PNG's 500 packed texts": (
        lambda: png_with(*[hostile.chunk(b"zTXt", b"x\0\0" + zlib.compress(b"x"))] * 500), lambda: PLAIN_PNG
    ),
    **{
        f"a PNG's {kind} with a wrong checksum": (partial(broken_png, kind.encode()), lambda: PLAIN_PNG)
        for kind in ("iCCP", "iTXt", "zTXt", "tEXt", "eXIf", "gAMA", "pHYs", "sRGB", "cHRM", "tIME", "acTL", "prVt")
    },
    "a PNG's text that is cut off": (
        lambda: PLAIN_PNG[:-12] + hostile.chunk(b"tEXt", b"a\0b" * 99)[:50], lambda: PLAIN_PNG
    ),
    "a PNG's EXIF of 2.5 MB": (lambda: png_with(hostile.chunk(b"eXIf", MEGABYTES)), lambda: PLAIN_PNG),
    "a JPEG's clipping paths": (lambda: jpeg_with(0xED, b"Photoshop 3.0\0"), lambda: JPEGS["baseline"]),
    "a JPEG's profile": (lambda: jpeg_with(0xE2, b"ICC_PROFILE\0\1\1"), lambda: JPEGS["baseline"]),
    "a JPEG's XMP": (lambda: jpeg_with(0xE1, b"http://ns.adobe.com/xmp/extension/\0"), lambda: JPEGS["baseline"]),
    "a JPEG's EXIF of 2.4 MB": (lambda: jpeg_with(0xE1, b"Exif\0\0"), lambda: JPEGS["baseline"]),
    "a JPEG's unknown segments": (lambda: jpeg_with(0xEB, b"HDR_RI"), lambda: JPEGS["baseline"]),
    "a JPEG's 3,000 comments": (
        lambda: hostile.jpeg_with(hostile.segment(0xFE, b"x") * 3000, image=JPEGS["baseline"]),
        lambda: JPEGS["baseline"],
    ),
    "a WebP's profile": (lambda: webp_with(b"ICCP", MEGABYTES), lambda: PLAIN_PNG),
    "a WebP's XMP": (lambda: webp_with(b"XMP ", MEGABYTES), lambda: PLAIN_PNG),
    "a WebP's EXIF": (lambda: webp_with(b"EXIF", MEGABYTES), lambda: PLAIN_PNG),
    "a WebP's EXIF that is cut off": (lambda: webp_with(b"EXIF", MEGABYTES)[:-9], lambda: PLAIN_PNG),
    "a GIF's comments": (lambda: gif_with(b"\xfe", *[b"x" * 255] * 60_000), lambda: PLAIN_GIF),
    "a GIF's XMP": (lambda: gif_with(b"\xff", b"XMP DataXMP", *[b"y" * 255] * 9_000), lambda: PLAIN_GIF),
    "a TIFF's XMP": (lambda: tiff_with((700, 1, 2_500_000)), tiff_with),
    "a TIFF's IPTC, counted in longs": (lambda: tiff_with((33723, 4, 600_000)), tiff_with),
    "a TIFF's profile": (lambda: tiff_with((34675, 7, 2_500_000)), tiff_with),
    "a TIFF's own tag of doubles": (lambda: tiff_with((65_000, 12, 300_000)), tiff_with),
}  # fmt: skip


@pytest.mark.parametrize("name", METADATA)
def test_metadata_is_no_reason_to_refuse_pixels(name: str) -> None:
    with_metadata, plain = METADATA[name]

    assert np.array_equal(prepare(with_metadata()), prepare(plain()))


def xmp(orientation: int) -> bytes:
    return b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % orientation


WITH_XMP: dict[str, Callable[[bytes], bytes]] = {
    "JPEG": lambda text: saved(Image.fromarray(colours(4)), "JPEG", xmp=text),
    "PNG": lambda text: png_with(hostile.chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + text)),
    "WebP": lambda text: saved(Image.fromarray(colours(4)), "WEBP", xmp=text),
    "TIFF": lambda text: saved(Image.fromarray(colours(4)), "TIFF", tiffinfo={700: text}),
    "TIFF, packed": lambda text: saved(
        Image.fromarray(colours(4)), "TIFF", tiffinfo={700: text}, compression="tiff_lzw"
    ),
}


@pytest.mark.parametrize("form", WITH_XMP)
def test_an_orientation_in_xmp_alone_turns_nothing(form: str) -> None:
    upright = resized(samples.decoded(WITH_XMP[form](xmp(1))))

    prepared = prepare(WITH_XMP[form](xmp(6)))

    assert np.abs(prepared.astype(int) - upright).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}], ids=["plain", "packed"])
def test_a_tiff_is_turned_once(orientation: int, options: dict[str, str]) -> None:
    upright = colours(5)
    turned = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: np.rot90(upright[::-1]), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    data = saved(Image.fromarray(np.ascontiguousarray(turned)), "TIFF", tiffinfo={274: orientation}, **options)

    assert np.abs(prepare(data).astype(int) - resized(upright)).max() <= 1


# Odd values


def clipboard_bmp(header: int, compression: int, alpha: int) -> bytes:
    """A BMP of 32 bits, 2 x 1, red and blue, as clipboards have them: `header` bytes of header."""
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    fields = struct.pack("<IiiHHIIiiII", header, 2, 1, 1, 32, compression, 8, 0, 0, 0, 0)
    fields += masks.ljust(header - 40, b"\0") if header > 40 else masks[:12] if compression == 3 else b""
    pixels = bytes([0, 0, 255, alpha, 255, 0, 0, alpha])
    start = 14 + len(fields)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + fields + pixels


@pytest.mark.parametrize(("header", "compression"), [(40, 0), (40, 3), (56, 3), (108, 0), (108, 3), (124, 0), (124, 3)])
def test_a_bmp_whose_alpha_is_all_zeros_is_opaque(header: int, compression: int) -> None:
    assert prepare(clipboard_bmp(header, compression, 0), (2, 1)).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_a_bmp_whose_alpha_says_something_is_laid_onto_white() -> None:
    assert prepare(clipboard_bmp(124, 3, 128), (2, 1)).tolist() == [[[255, 127, 127], [127, 127, 255]]]


GDAL_NODATA, PIXEL_SCALE = 42113, 33550


@pytest.mark.parametrize(
    ("kind", "nodata", "tags"),
    [
        pytest.param("float32", -9999, {GDAL_NODATA: "-9999"}, id="floats"),
        pytest.param("float32", -3.4028234663852886e38, {GDAL_NODATA: "-3.4028234663852886e+38"}, id="the least float"),
        pytest.param("float32", -3.4028234663852886e38, {}, id="the least float without a tag"),
        pytest.param("float32", np.nan, {GDAL_NODATA: "nan"}, id="no numbers"),
        pytest.param("float32", np.nan, {}, id="no numbers without a tag"),
        pytest.param("float32", -9999, {PIXEL_SCALE: (30.0, 30.0, 0.0)}, id="floats of a map without the tag"),
        pytest.param("float32", 0, {GDAL_NODATA: "0"}, id="zeros"),
        pytest.param("float32", 99999, {GDAL_NODATA: " 99999 "}, id="above all others"),
        pytest.param("int16", -32768, {GDAL_NODATA: "-32768"}, id="16 bits"),
        pytest.param("int16", -32768, {PIXEL_SCALE: (30.0, 30.0, 0.0)}, id="16 bits of a map without the tag"),
        pytest.param("int32", -2147483648, {GDAL_NODATA: "-2147483648"}, id="32 bits"),
        pytest.param("int32", -9999, {GDAL_NODATA: "-9999"}, id="32 bits, -9999"),
        pytest.param("uint16", 65535, {GDAL_NODATA: "65535"}, id="16 bits without a sign"),
        pytest.param("uint16", 0, {GDAL_NODATA: "0"}, id="16 bits without a sign, zeros"),
    ],
)
def test_a_map_is_stretched_between_its_real_values(kind: str, nodata: float, tags: dict[int, object]) -> None:
    values = np.array([[nodata, 1000, 1100], [1200, 1400, nodata]], kind)

    prepared = prepare(grey_tiff(values, tags), (3, 2))

    assert prepared[..., 0].tolist() == [[0, 0, 64], [128, 255, 0]]


def grey_tiff(values: np.ndarray, tags: dict[int, object]) -> bytes:
    height, width = values.shape
    signs = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    more: list[hostile.Tag] = [(258, 3, 1, values.itemsize * 8), (339, 3, 1, signs)]
    for tag, value in tags.items():
        if isinstance(value, str):
            more.append((tag, 2, len(value) + 1, value.encode() + b"\0"))
        elif isinstance(value, tuple):
            more.append((tag, 12, len(value), struct.pack(f"<{len(value)}d", *value)))
    return hostile.strip(width, height, values.tobytes(), *more)


def test_a_map_without_a_value_is_black() -> None:
    assert prepare(grey_tiff(np.full((2, 3), -9999, np.float32), {GDAL_NODATA: "-9999"}), (3, 2)).max() == 0


@pytest.mark.parametrize("tag", ["rubbish", "", "1e999", "-9999 -8888"])
def test_a_nodata_tag_that_is_no_number_is_left_alone(tag: str) -> None:
    values = np.array([[0, 100, 200]], np.float32)

    assert prepare(grey_tiff(values, {GDAL_NODATA: tag}), (3, 1))[..., 0].tolist() == [[0, 128, 255]]


def test_floats_that_are_no_map_keep_their_least_value() -> None:
    values = np.array([[-9999, 0, 9999]], np.float32)

    assert prepare(grey_tiff(values, {}), (3, 1))[..., 0].tolist() == [[0, 128, 255]]


# Phones


def jpeg_of(width: int, height: int, marker: bytes = b"\xff\xc0") -> bytes:
    """The header of a photo of this size, and few of its pixels."""
    data = hostile.jpeg(progressive=marker == b"\xff\xc2")
    at = data.index(marker) + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.parametrize(
    "size", [(8160, 6144), (8192, 6144), (9280, 6944), (12032, 9024), (16320, 12240), (16384, 12288)], ids=str
)
def test_what_phones_make_is_not_too_large(size: tuple[int, int]) -> None:
    assert prepare(jpeg_of(*size)).shape == (224, 224, 3)


@pytest.mark.parametrize("form", ["HEIF", "AVIF", "WEBP"])
def test_a_phones_50_megapixels_fit_in_memory_whatever_their_format(form: str) -> None:
    image = Image.new("RGB", (1, 1))
    image.format, image._size = form, (8192, 6144)

    assert preparation.bytes_to_decode(image, (224, 224)) <= settings.MAX_DECODE_BYTES


@pytest.mark.parametrize(
    ("data", "why"),
    [
        pytest.param(jpeg_of(16320, 12240, b"\xff\xc2"), "a progressive one is held in full", id="progressive"),
        pytest.param(jpeg_of(65500, 65500), "even an eighth of it is too large", id="an eighth"),
        pytest.param(saved(Image.new("1", (9300, 9300)), "PNG"), "a PNG is decoded in full", id="PNG"),
    ],
)
def test_pixels_that_are_decoded_are_what_is_limited(data: bytes, why: str) -> None:
    with pytest.raises(preparation.TooLarge, match="megapixels"):
        prepare(data)


WHOLE = saved(Image.fromarray(colours(2)), "PNG")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"hello", id="text"),
        pytest.param(b"\0" * 1000, id="zeros"),
        pytest.param(b"%PDF-1.4", id="pdf"),
        pytest.param(b"<svg/>", id="svg"),
        pytest.param(saved(Image.fromarray(colours(2)), "PPM"), id="a format that is not taken"),
        pytest.param(WHOLE[:8], id="only a signature"),
        pytest.param(WHOLE[:40], id="only a header"),
        pytest.param(WHOLE[:-3000], id="cut off"),
        pytest.param(b"\xff\xd8\xff\xe0" + b"x" * 99, id="rubbish behind a signature"),
        pytest.param(saved(Image.fromarray(colours(2)), "JPEG")[:2000], id="half a jpeg"),
    ],
)
def test_what_is_not_a_whole_image_is_a_bad_image(data: bytes) -> None:
    with pytest.raises(preparation.BadImage):
        prepare(data)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (
            b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- made by hand -->\n<!DOCTYPE svg PUBLIC "x">\n<svg >',
            "an SVG drawing",
        ),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"8BPS\0\1", "a Photoshop document"),
        (b"\xff\x0a\xfa\x1f", "a JPEG XL image"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image"),
        (saved(hostile.SMALL, "JPEG2000"), "a JPEG 2000 image"),
        (saved(hostile.SMALL, "ICO"), "an icon"),
        (hostile.box(b"ftyp", b"isom\0\0\2\0isomiso2") + hostile.box(b"mdat"), "a video"),
        (hostile.box(b"ftyp", b"qt  \0\0\2\0qt  "), "a video"),
        (b"\x1aE\xdf\xa3" + b"\0" * 40, "a video"),
        (hostile.box(b"ftyp", b"crx \0\0\0\1crx isom"), "a camera's raw file"),
        (b"PK\3\4" + b"\0" * 40, "a ZIP archive"),
        (b"\x1f\x8b\x08" + b"\0" * 40, "a gzip archive"),
        (b"<!doctype html><title>x</title>", "a web page"),
        (b"\n<html lang='en'>", "a web page"),
        (b"data:image/png;base64,iVBORw0KGgo", "the text of a data URL"),
        (b"iVBORw0KGgoAAAANSUhEUgAAAAUAAAAFCAYAAACNbyblAAAA", "an image as base64 text"),
        (b'{"image": "x"}', "JSON"),
        ("Grüße, das ist kein Bild".encode(), "text"),
    ],
)
def test_a_file_of_another_kind_is_named(data: bytes, name: str) -> None:
    with pytest.raises(preparation.BadImage, match=f"^This is {name}, so send a file of JPEG, .* or AVIF.$"):
        prepare(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "HEIC", "AVIF"])
def test_a_format_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    data = saved(hostile.SMALL, "HEIF" if form == "HEIC" else form)
    monkeypatch.setattr(settings, "IMAGE_FORMATS", form)
    assert prepare(data).shape == (224, 224, 3)

    monkeypatch.setattr(settings, "IMAGE_FORMATS", "PNG,BMP" if form == "JPEG" else "JPEG")

    with pytest.raises(preparation.BadImage, match=f"^This is an? {form} image, so send a file of "):
        prepare(data)


@pytest.mark.parametrize("brand", [b"mif1", b"msf1", b"avif"])
def test_a_heif_is_known_by_what_is_in_it(brand: bytes) -> None:
    assert prepare(hostile.heif(hostile.heic_item(), brand=brand)).shape == (224, 224, 3)


@pytest.mark.parametrize("made", [hostile.ODD["heic_of_RGBA"], hostile.ODD["avif_of_RGBA"]], ids=["HEIC", "AVIF"])
def test_a_heif_that_is_cut_anywhere_is_refused(made: tuple[Callable[[], bytes], int]) -> None:
    whole = made[0]()

    for size in range(1, len(whole) - 1, max(1, len(whole) // 150)):
        with pytest.raises(preparation.BadImage):
            prepare(whole[:size])


def test_the_reason_for_the_log_is_one_line_without_addresses() -> None:
    for data in (WHOLE[:40], b"RIFF\xff\xff\0\0WEBPVP8 rubbish", WHOLE[:-3000], b"II*\0\x08\0\0\0\1\0" + b"\n" * 90):
        with pytest.raises(preparation.BadImage) as raised:
            prepare(data)
        text = preparation.reason(raised.value)
        assert text
        assert text.isprintable()
        assert " at 0x" not in text


def test_an_image_that_takes_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "MAX_DECODE_BYTES", 10_000_000)

    with pytest.raises(preparation.TooLarge, match="more than 10 MB of memory"):
        prepare(saved(Image.new("RGB", (2000, 1500)), "PNG"))
    assert prepare(saved(Image.new("RGB", (2000, 1500)), "JPEG")).shape == (224, 224, 3)  # decoded at a quarter


def test_large_images_are_resized_in_strips_to_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [sample.data for sample in samples.samples()]
    whole = [prepare(data) for data in files]

    monkeypatch.setattr(image_colors, "STRIP_PIXELS", 20_000)

    for expected, data in zip(whole, files, strict=True):
        assert np.abs(prepare(data).astype(int) - expected).max() <= 1


def test_a_tower_of_many_rows_takes_little_memory() -> None:
    tower = np.repeat(np.linspace(0, 255, 400_000).astype(np.uint8)[:, None], 2, axis=1)

    prepared = prepare(saved(Image.fromarray(tower), "PNG"))

    assert np.abs(prepared[:, 100, 0].astype(int) - np.linspace(0.6, 254.4, 224)).max() <= 2


def test_an_empty_file_is_a_missing_image() -> None:
    with pytest.raises(preparation.MissingImage):
        prepare(b"")


@pytest.mark.parametrize("side", [101, 400])
def test_pixels_are_counted_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    monkeypatch.setattr(settings, "MAX_IMAGE_PIXELS", 100 * 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    header_only = saved(Image.new("RGB", (side, 100)), "PNG")[:60]

    with pytest.raises(preparation.TooLarge):
        prepare(header_only)
