"""Turning a client's file into the pixels that the model gets."""

import io
import struct
import zlib
from collections.abc import Callable
from functools import partial

import hostile
import numpy as np
import pytest
import samples
from hostile.heif import box, heic_item, make_heif
from hostile.jpeg import COMMENT, EXIF, PROFILE, claiming, jpeg_with, segment
from hostile.png import chunk
from hostile.tiff import BITS, STRIP_LENGTHS, Tag, tiff_of_strip
from hostile.webp import canvas, make_webp
from PIL import Image
from samples import colors, saved

import settings
from helpers import Pixels
from web import image_colors
from web import image_preparation as preparation

TARGET = (224, 224)


def prepare(data: bytes, target: tuple[int, int] = TARGET, channels: int = 3) -> Pixels:
    return preparation.prepare_image(preparation.open_image(io.BytesIO(data)), target, channels)


def resized(pixels: samples.Array, target: tuple[int, int] = TARGET) -> samples.Array:
    return np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.BICUBIC))


def turned(upright: samples.Array, orientation: int) -> Image.Image:
    """The image that this EXIF orientation turns upright."""
    pixels = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: np.rot90(upright[::-1]), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    return Image.fromarray(np.ascontiguousarray(pixels))


@pytest.mark.parametrize("sample", samples.samples(), ids=lambda sample: sample.name)
def test_every_format_and_mode_gives_its_pixels(sample: samples.Sample) -> None:
    prepared = prepare(sample.data)

    assert prepared.shape == (224, 224, 3)
    assert prepared.dtype == np.uint8
    # They may differ by one level, since rounding may come before or after the resize.
    assert np.abs(prepared.astype(int) - resized(sample.pixels)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(orientation: int) -> None:
    upright = colors(5)
    exif = Image.Exif()
    exif[0x0112] = orientation

    prepared = prepare(saved(turned(upright, orientation), "PNG", exif=exif))

    assert np.abs(prepared.astype(int) - resized(upright)).max() <= 1


def test_a_photo_with_a_damaged_exif_is_accepted() -> None:
    data = saved(Image.fromarray(colors(1)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xee" * 40)

    assert prepare(data).shape == (224, 224, 3)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_smaller_but_never_below_the_target(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    rgb = colors(3, (2400, 1000))
    data = saved(Image.fromarray(rgb), "JPEG", quality=95, exif=exif)
    image = preparation.open_image(io.BytesIO(data))

    prepared = preparation.prepare_image(image, (200, 380))

    # Half the size. At a quarter it would be 250 high, less than 380, the longer side of the target.
    assert image.size == (1200, 500)
    expected = resized(np.rot90(rgb, -1) if orientation == 6 else rgb, (200, 380))
    assert np.abs(prepared.astype(int) - expected).mean() < 2


def test_a_jpeg_just_above_twice_the_target_is_decoded_at_full_size() -> None:
    rgb = colors(3, (600, 512))
    image = preparation.open_image(io.BytesIO(saved(Image.fromarray(rgb), "JPEG", quality=95)))

    preparation.prepare_image(image, (224, 224))

    # At half the size it would be 256 high, hardly more than the target. That changed the probability of a real photo
    # from 0.46 to 0.43.
    assert image.size == (600, 512)


def test_width_and_height_are_not_swapped() -> None:
    assert prepare(saved(Image.fromarray(colors(1)), "PNG"), (30, 20)).shape == (20, 30, 3)


def test_pixels_can_be_gray_and_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "IMAGE_DTYPE", "float32")

    prepared = prepare(saved(Image.fromarray(colors(1)), "PNG"), channels=1)

    assert prepared.shape == (224, 224, 1)
    assert prepared.dtype == np.float32
    assert prepared.max() > 1  # still 0 to 255


def test_the_resampling_filter_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = np.indices((64, 64)).sum(axis=0) % 2 * 255
    data = saved(Image.fromarray(checks.astype(np.uint8)), "PNG")
    assert set(np.unique(prepare(data, (16, 16)))) != {0, 255}

    monkeypatch.setattr(settings, "IMAGE_RESAMPLE", "nearest")

    assert set(np.unique(prepare(data, (16, 16)))) <= {0, 255}


def test_nan_and_infinity_do_not_hide_other_values() -> None:
    values = np.array([[0, 3e38, -3e38], [np.nan, np.inf, -np.inf]], np.float32)

    prepared = prepare(saved(Image.fromarray(values), "TIFF"), (3, 2))

    assert prepared[..., 0].tolist() == [[128, 255, 0], [0, 255, 0]]


# JPEG files without their end marker


def noisy_jpeg(mode: str, **options: object) -> bytes:
    noise = np.random.default_rng(7).integers(0, 256, (75, 67, 3), dtype=np.uint8)
    return saved(Image.fromarray(noise).convert(mode), "JPEG", quality=90, **options)


JPEGS = {
    "baseline": noisy_jpeg("RGB"),
    "progressive": noisy_jpeg("RGB", progressive=True),
    "gray": noisy_jpeg("L"),
    "progressive gray": noisy_jpeg("L", progressive=True),
    "CMYK": noisy_jpeg("CMYK"),
    "4:2:0": noisy_jpeg("RGB", subsampling="4:2:0"),
    "with restarts": noisy_jpeg("RGB", restart_marker_blocks=2),
    "of one color": saved(Image.new("RGB", (300, 300), "red"), "JPEG"),
    "with an odd component order": noisy_jpeg("RGB", keep_rgb=True),
}


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_without_its_end_marker_is_accepted(name: str) -> None:
    whole = JPEGS[name]
    assert whole.endswith(b"\xff\xd9")

    for cut in (1, 2):
        assert np.array_equal(prepare(whole[:-cut]), prepare(whole))


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_lacks_pixels_is_refused(name: str) -> None:
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


@pytest.mark.parametrize("data", [b"\0" * 5000, b"rubbish" * 99, JPEGS["baseline"]], ids=["zeros", "text", "a JPEG"])
def test_data_after_a_jpeg_is_ignored(data: bytes) -> None:
    assert np.array_equal(prepare(JPEGS["progressive"] + data), prepare(JPEGS["progressive"]))


# Metadata

MEGABYTES = b"\x9c" * 2_500_000


def png_with(*chunks: bytes) -> bytes:
    return PLAIN_PNG[:33] + b"".join(chunks) + PLAIN_PNG[33:]


def broken_png(kind: bytes) -> bytes:
    good = chunk(kind, b"MM\0*rubbish")
    return png_with(good[:-1] + bytes([good[-1] ^ 1]))


def compressed_png(kind: bytes) -> bytes:
    return png_with(chunk(kind, b"x\0\0" + zlib.compress(MEGABYTES)))


def large_jpeg(marker: int, start: bytes) -> bytes:
    return jpeg_with(segment(marker, start + MEGABYTES[:60_000]) * 40, image=JPEGS["baseline"])


def webp_with(kind: bytes, data: bytes) -> bytes:
    inner = saved(Image.fromarray(colors(8)), "WEBP", lossless=True)[12:]
    [size] = struct.unpack_from("<I", inner, 4)
    return make_webp(canvas(260, 190, 0x2C), (inner[:4], inner[8 : 8 + size]), (kind, data))


def gif_with(label: bytes, *blocks: bytes) -> bytes:
    extension = b"!" + label + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"
    return PLAIN_GIF[: gif_frame_offset()] + extension + PLAIN_GIF[gif_frame_offset() :]


def gif_frame_offset() -> int:
    return 13 + 3 * (2 << (PLAIN_GIF[10] & 7))


def tiff_with(*tags: tuple[int, int, int]) -> bytes:
    """A TIFF with these tags (number, type, count); the values of all of them begin after the pixels."""
    more = [(*tag, 1200) for tag in tags]
    return tiff_of_strip(20, 10, bytes(range(200)) + (MEGABYTES if tags else b""), (STRIP_LENGTHS, 4, 1, 200), *more)


PLAIN_PNG = saved(Image.fromarray(colors(8)), "PNG")
PLAIN_GIF = saved(Image.fromarray(colors(8)).quantize(16), "GIF")
# A file with the metadata, and a file with the same picture without it.
METADATA: dict[str, tuple[Callable[[], bytes], Callable[[], bytes]]] = {
    "a PNG's profile of 2.5 MB": (partial(compressed_png, b"iCCP"), lambda: PLAIN_PNG),
    "a PNG's compressed text of 2.5 MB": (partial(compressed_png, b"zTXt"), lambda: PLAIN_PNG),
    "a PNG's XMP of 2.5 MB": (
        lambda: png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + MEGABYTES)), lambda: PLAIN_PNG
    ),
    "a PNG's 500 compressed texts": (
        lambda: png_with(*[chunk(b"zTXt", b"x\0\0" + zlib.compress(b"x"))] * 500), lambda: PLAIN_PNG
    ),
    **{
        f"a PNG's {kind} with a wrong checksum": (partial(broken_png, kind.encode()), lambda: PLAIN_PNG)
        for kind in ("iCCP", "iTXt", "zTXt", "tEXt", "eXIf", "gAMA", "pHYs", "sRGB", "cHRM", "tIME", "acTL", "prVt")
    },
    "a PNG's text that is cut off": (
        lambda: PLAIN_PNG[:-12] + chunk(b"tEXt", b"a\0b" * 99)[:50], lambda: PLAIN_PNG
    ),
    "a PNG's EXIF of 2.5 MB": (lambda: png_with(chunk(b"eXIf", MEGABYTES)), lambda: PLAIN_PNG),
    "a JPEG's clipping paths": (lambda: large_jpeg(0xED, b"Photoshop 3.0\0"), lambda: JPEGS["baseline"]),
    "a JPEG's profile": (lambda: large_jpeg(PROFILE, b"ICC_PROFILE\0\1\1"), lambda: JPEGS["baseline"]),
    "a JPEG's XMP": (lambda: large_jpeg(EXIF, b"http://ns.adobe.com/xmp/extension/\0"), lambda: JPEGS["baseline"]),
    "a JPEG's EXIF of 2.4 MB": (lambda: large_jpeg(EXIF, b"Exif\0\0"), lambda: JPEGS["baseline"]),
    "a JPEG's unknown segments": (lambda: large_jpeg(0xEB, b"HDR_RI"), lambda: JPEGS["baseline"]),
    "a JPEG's 3,000 comments": (
        lambda: jpeg_with(segment(COMMENT, b"x") * 3000, image=JPEGS["baseline"]),
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
    "a TIFF's private tag of doubles": (lambda: tiff_with((65_000, 12, 300_000)), tiff_with),
}  # fmt: skip


@pytest.mark.parametrize("name", METADATA)
def test_an_image_is_accepted_whatever_its_metadata(name: str) -> None:
    with_metadata, plain = METADATA[name]

    assert np.array_equal(prepare(with_metadata()), prepare(plain()))


def xmp(orientation: int) -> bytes:
    return b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % orientation


WITH_XMP: dict[str, Callable[[bytes], bytes]] = {
    "JPEG": lambda text: saved(Image.fromarray(colors(4)), "JPEG", xmp=text),
    "PNG": lambda text: png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + text)),
    "WebP": lambda text: saved(Image.fromarray(colors(4)), "WEBP", xmp=text),
    "TIFF": lambda text: saved(Image.fromarray(colors(4)), "TIFF", tiffinfo={700: text}),
    "TIFF, compressed": lambda text: saved(
        Image.fromarray(colors(4)), "TIFF", tiffinfo={700: text}, compression="tiff_lzw"
    ),
}


@pytest.mark.parametrize("form", WITH_XMP)
def test_an_orientation_in_xmp_is_ignored(form: str) -> None:
    upright = resized(samples.decoded(WITH_XMP[form](xmp(1))))

    prepared = prepare(WITH_XMP[form](xmp(6)))

    assert np.abs(prepared.astype(int) - upright).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}], ids=["plain", "compressed"])
def test_a_tiff_is_turned_once(orientation: int, options: dict[str, str]) -> None:
    upright = colors(5)
    data = saved(turned(upright, orientation), "TIFF", tiffinfo={274: orientation}, **options)

    assert np.abs(prepare(data).astype(int) - resized(upright)).max() <= 1


# Odd values


def clipboard_bmp(header: int, compression: int, alpha: int) -> bytes:
    """A BMP of 2 x 1 pixels, red and blue, in 32 bits as clipboards write it, with `header` bytes of header."""
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    fields = struct.pack("<IiiHHIIiiII", header, 2, 1, 1, 32, compression, 8, 0, 0, 0, 0)
    fields += masks.ljust(header - 40, b"\0") if header > 40 else masks[:12] if compression == 3 else b""
    pixels = bytes([0, 0, 255, alpha, 255, 0, 0, alpha])
    start = 14 + len(fields)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + fields + pixels


@pytest.mark.parametrize(("header", "compression"), [(40, 0), (40, 3), (56, 3), (108, 0), (108, 3), (124, 0), (124, 3)])
def test_a_bmp_with_an_alpha_of_zeros_is_opaque(header: int, compression: int) -> None:
    assert prepare(clipboard_bmp(header, compression, 0), (2, 1)).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_a_bmp_with_a_real_alpha_is_put_on_white() -> None:
    assert prepare(clipboard_bmp(124, 3, 128), (2, 1)).tolist() == [[[255, 127, 127], [127, 127, 255]]]


GDAL_NODATA, PIXEL_SCALE = 42113, 33550


@pytest.mark.parametrize(
    ("kind", "nodata", "tags"),
    [
        pytest.param("float32", -9999, {GDAL_NODATA: "-9999"}, id="floats"),
        pytest.param(
            "float32", -3.4028234663852886e38, {GDAL_NODATA: "-3.4028234663852886e+38"}, id="the lowest float"
        ),
        pytest.param("float32", -3.4028234663852886e38, {}, id="the lowest float without a tag"),
        pytest.param("float32", np.nan, {GDAL_NODATA: "nan"}, id="NaN"),
        pytest.param("float32", np.nan, {}, id="NaN without a tag"),
        pytest.param("float32", -9999, {PIXEL_SCALE: (30.0, 30.0, 0.0)}, id="floats of a map without the tag"),
        pytest.param("float32", 0, {GDAL_NODATA: "0"}, id="zeros"),
        pytest.param("float32", 99999, {GDAL_NODATA: " 99999 "}, id="above all other values"),
        pytest.param("int16", -32768, {GDAL_NODATA: "-32768"}, id="16 bits"),
        pytest.param("int16", -32768, {PIXEL_SCALE: (30.0, 30.0, 0.0)}, id="16 bits of a map without the tag"),
        pytest.param("int32", -2147483648, {GDAL_NODATA: "-2147483648"}, id="32 bits"),
        pytest.param("int32", -9999, {GDAL_NODATA: "-9999"}, id="32 bits, -9999"),
        pytest.param("uint16", 65535, {GDAL_NODATA: "65535"}, id="unsigned 16 bits"),
        pytest.param("uint16", 0, {GDAL_NODATA: "0"}, id="unsigned 16 bits, zeros"),
    ],
)
def test_a_map_is_stretched_between_its_real_values(kind: str, nodata: float, tags: dict[int, object]) -> None:
    values = np.array([[nodata, 1000, 1100], [1200, 1400, nodata]], kind)

    prepared = prepare(gray_tiff(values, tags), (3, 2))

    assert prepared[..., 0].tolist() == [[0, 0, 64], [128, 255, 0]]


def gray_tiff(values: np.ndarray, tags: dict[int, object]) -> bytes:
    height, width = values.shape
    signs = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    more: list[Tag] = [(BITS, 3, 1, values.itemsize * 8), (339, 3, 1, signs)]
    for tag, value in tags.items():
        if isinstance(value, str):
            more.append((tag, 2, len(value) + 1, value.encode() + b"\0"))
        elif isinstance(value, tuple):
            more.append((tag, 12, len(value), struct.pack(f"<{len(value)}d", *value)))
    return tiff_of_strip(width, height, values.tobytes(), *more)


def test_a_map_without_any_value_is_black() -> None:
    assert prepare(gray_tiff(np.full((2, 3), -9999, np.float32), {GDAL_NODATA: "-9999"}), (3, 2)).max() == 0


@pytest.mark.parametrize("tag", ["rubbish", "", "1e999", "-9999 -8888"])
def test_a_nodata_tag_that_is_not_a_number_is_ignored(tag: str) -> None:
    values = np.array([[0, 100, 200]], np.float32)

    assert prepare(gray_tiff(values, {GDAL_NODATA: tag}), (3, 1))[..., 0].tolist() == [[0, 128, 255]]


def test_floats_outside_of_a_map_keep_their_lowest_value() -> None:
    values = np.array([[-9999, 0, 9999]], np.float32)

    assert prepare(gray_tiff(values, {}), (3, 1))[..., 0].tolist() == [[0, 128, 255]]


# Phones


@pytest.mark.parametrize(
    "size", [(8160, 6144), (8192, 6144), (9280, 6944), (12032, 9024), (16320, 12240), (16384, 12288)], ids=str
)
def test_photos_from_phones_are_not_too_large(size: tuple[int, int]) -> None:
    assert prepare(claiming(*size)).shape == (224, 224, 3)


@pytest.mark.parametrize("form", ["HEIF", "AVIF", "WEBP"])
def test_50_megapixels_fit_in_memory_in_every_format_of_phones(form: str) -> None:
    image = Image.new("RGB", (1, 1))
    image.format, image._size = form, (8192, 6144)

    assert preparation.bytes_to_decode(image, (224, 224)) <= settings.MAX_DECODE_BYTES


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(claiming(16320, 12240, progressive=True), id="a progressive JPEG is held in memory at full size"),
        pytest.param(claiming(65500, 65500), id="a JPEG too large even at an eighth"),
        pytest.param(saved(Image.new("1", (9300, 9300)), "PNG"), id="a PNG is decoded at full size"),
    ],
)
def test_the_decoded_pixels_are_limited(data: bytes) -> None:
    with pytest.raises(preparation.TooLarge, match="megapixels"):
        prepare(data)


WHOLE = saved(Image.fromarray(colors(2)), "PNG")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"hello", id="text"),
        pytest.param(b"\0" * 1000, id="zeros"),
        pytest.param(b"%PDF-1.4", id="pdf"),
        pytest.param(b"<svg/>", id="svg"),
        pytest.param(saved(Image.fromarray(colors(2)), "PPM"), id="an unsupported format"),
        pytest.param(WHOLE[:8], id="only a signature"),
        pytest.param(WHOLE[:40], id="only a header"),
        pytest.param(WHOLE[:-3000], id="cut off"),
        pytest.param(b"\xff\xd8\xff\xe0" + b"x" * 99, id="rubbish after a signature"),
        pytest.param(saved(Image.fromarray(colors(2)), "JPEG")[:2000], id="half a jpeg"),
    ],
)
def test_a_file_that_is_not_a_whole_image_is_a_bad_image(data: bytes) -> None:
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
        (box(b"ftyp", b"isom\0\0\2\0isomiso2") + box(b"mdat"), "a video"),
        (box(b"ftyp", b"qt  \0\0\2\0qt  "), "a video"),
        (b"\x1aE\xdf\xa3" + b"\0" * 40, "a video"),
        (box(b"ftyp", b"crx \0\0\0\1crx isom"), "a camera's raw file"),
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
def test_the_error_names_other_kinds_of_files(data: bytes, name: str) -> None:
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
def test_a_heif_is_recognized_by_its_content(brand: bytes) -> None:
    assert prepare(make_heif(heic_item(), brand=brand)).shape == (224, 224, 3)


@pytest.mark.parametrize("form", ["HEIC", "AVIF"])
def test_a_heif_that_is_cut_off_anywhere_is_refused(form: str) -> None:
    make, _ = hostile.ODD[f"{form}: mode RGBA"]
    whole = make()

    for size in range(1, len(whole) - 1, max(1, len(whole) // 150)):
        with pytest.raises(preparation.BadImage):
            prepare(whole[:size])


def test_the_reason_in_the_log_is_one_line_without_memory_addresses() -> None:
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


def test_resizing_in_strips_gives_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [sample.data for sample in samples.samples()]
    whole = [prepare(data) for data in files]

    monkeypatch.setattr(image_colors, "STRIP_PIXELS", 20_000)

    for expected, data in zip(whole, files, strict=True):
        assert np.abs(prepare(data).astype(int) - expected).max() <= 1


def test_a_very_tall_image_is_resized_correctly() -> None:
    tall = np.repeat(np.linspace(0, 255, 400_000).astype(np.uint8)[:, None], 2, axis=1)

    prepared = prepare(saved(Image.fromarray(tall), "PNG"))

    assert np.abs(prepared[:, 100, 0].astype(int) - np.linspace(0.6, 254.4, 224)).max() <= 2


def test_an_empty_file_is_a_missing_image() -> None:
    with pytest.raises(preparation.MissingImage):
        prepare(b"")


@pytest.mark.parametrize("side", [101, 400])
def test_pixels_are_counted_before_decoding(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    monkeypatch.setattr(settings, "MAX_IMAGE_PIXELS", 100 * 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    header_only = saved(Image.new("RGB", (side, 100)), "PNG")[:60]

    with pytest.raises(preparation.TooLarge):
        prepare(header_only)
