"""One image in every format and mode that the service reads, each with its expected pixels.

The expected pixels come from the array that the file was made from, or from Pillow if the format is lossy, never from
the code under test.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pillow_heif
from PIL import Image

pillow_heif.register_heif_opener()  # to write HEIC, and to read the expected pixels

Array = npt.NDArray[np.uint8]
SIZE = (260, 190)


def colors(seed: int, size: tuple[int, int] = SIZE) -> Array:
    """A smooth picture with a few edges, (height, width, 3)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return np.asarray(small.resize(size, Image.Resampling.BICUBIC))


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def on_white(rgb: Array, alpha: Array) -> Array:
    share = alpha[..., None] / 255
    return np.rint(rgb * share + 255 * (1 - share)).astype(np.uint8)


def gray_as_rgb(gray: Array) -> Array:
    return np.repeat(gray[..., None], 3, axis=2)


@dataclass
class Sample:
    """A file, and the RGB pixels (height, width, 3) that it shows, upright and on white."""

    name: str
    data: bytes
    pixels: Array


def samples() -> list[Sample]:
    """Return one sample for each format and mode."""
    return [Sample(make.__name__, *make(seed)) for seed, make in enumerate(MAKERS)]


Made = tuple[bytes, Array]
MAKERS: list[Callable[[int], Made]] = []


def maker(function: Callable[[int], Made]) -> Callable[[int], Made]:
    MAKERS.append(function)
    return function


def decoded(data: bytes) -> Array:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def lossless(form: str, **options: Any) -> Callable[[int], Made]:
    def make(seed: int) -> Made:
        rgb = colors(seed)
        return saved(Image.fromarray(rgb), form, **options), rgb

    return make


def lossy(form: str, mode: str, **options: Any) -> Callable[[int], Made]:
    def make(seed: int) -> Made:
        data = saved(Image.fromarray(colors(seed)).convert(mode), form, quality=95, **options)
        return data, decoded(data)

    return make


jpeg = partial(lossy, "JPEG")


for name, function in {
    "png": lossless("PNG"),
    "bmp": lossless("BMP"),
    "tiff": lossless("TIFF"),
    "tiff_lzw": lossless("TIFF", compression="tiff_lzw"),
    "webp": lossless("WEBP", lossless=True),
    "jpeg": jpeg("RGB"),
    "jpeg_progressive": jpeg("RGB", progressive=True),
    "jpeg_gray": jpeg("L"),
    "jpeg_cmyk": jpeg("CMYK"),
    "heic": lossy("HEIF", "RGB"),
    "heic_gray": lossy("HEIF", "L"),
    "heic_with_full_chroma": lossy("HEIF", "RGB", chroma=444),
    "heic_of_tiles": lossy("HEIF", "RGB", tile_size=64),
    "avif": lossy("AVIF", "RGB", speed=10),
    "avif_gray": lossy("AVIF", "L", speed=10),
    "avif_with_full_chroma": lossy("AVIF", "RGB", speed=10, subsampling="4:4:4"),
}.items():
    function.__name__ = name
    maker(function)


@maker
def jpeg_turned_by_exif(seed: int) -> Made:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    data = saved(Image.fromarray(colors(seed)), "JPEG", quality=95, exif=exif)
    return data, np.rot90(decoded(data), -1)


@maker
def png_with_alpha(seed: int) -> Made:
    rgb = colors(seed)
    alpha = colors(seed + 100)[..., 0]
    return saved(Image.fromarray(np.dstack([rgb, alpha])), "PNG"), on_white(rgb, alpha)


@maker
def png_gray_with_alpha(seed: int) -> Made:
    gray, alpha = colors(seed)[..., 0], colors(seed)[..., 1]
    return saved(Image.fromarray(np.dstack([gray, alpha]), "LA"), "PNG"), on_white(gray_as_rgb(gray), alpha)


@maker
def png_with_palette(seed: int) -> Made:
    image = Image.fromarray(colors(seed)).quantize(64)
    return saved(image, "PNG"), np.asarray(image.convert("RGB"))


@maker
def png_with_a_transparent_palette_entry(seed: int) -> Made:
    image = Image.fromarray(colors(seed)).quantize(16)
    index = np.asarray(image)
    rgb = np.asarray(image.convert("RGB"))
    alpha = np.where(index == 3, 0, 255).astype(np.uint8)
    return saved(image, "PNG", transparency=3), on_white(rgb, alpha)


@maker
def png_with_a_transparent_color(seed: int) -> Made:
    rgb = colors(seed).copy()
    rgb[:60] = (10, 20, 30)
    white = rgb.copy()
    white[:60] = 255
    return saved(Image.fromarray(rgb), "PNG", transparency=(10, 20, 30)), white


@maker
def png_black_and_white(seed: int) -> Made:
    image = Image.fromarray(colors(seed)).convert("1")
    return saved(image, "PNG"), gray_as_rgb(np.asarray(image).astype(np.uint8) * 255)


@maker
def png_of_16_bits(seed: int) -> Made:
    gray = colors(seed)[..., 0]
    return saved(Image.fromarray(gray.astype(np.uint16) * 257), "PNG"), gray_as_rgb(gray)


@maker
def tiff_of_16_bits(seed: int) -> Made:
    gray = colors(seed)[..., 0]
    return saved(Image.fromarray(gray.astype(np.uint16) * 257), "TIFF"), gray_as_rgb(gray)


@maker
def tiff_of_floats(seed: int) -> Made:
    gray = colors(seed)[..., 0].copy()
    gray[0, :2] = (0, 255)
    return saved(Image.fromarray(gray.astype(np.float32) / 255), "TIFF"), gray_as_rgb(gray)


@maker
def tiff_cmyk(seed: int) -> Made:
    image = Image.fromarray(colors(seed)).convert("CMYK")
    return saved(image, "TIFF"), np.asarray(image.convert("RGB"))


@maker
def gif(seed: int) -> Made:
    image = Image.fromarray(colors(seed)).quantize(128)
    return saved(image, "GIF"), np.asarray(image.convert("RGB"))


@maker
def gif_animated(seed: int) -> Made:
    first, second = (Image.fromarray(colors(seed + more)).quantize(128) for more in (0, 200))
    return saved(first, "GIF", save_all=True, append_images=[second]), np.asarray(first.convert("RGB"))


@maker
def webp_with_alpha(seed: int) -> Made:
    rgb, alpha = colors(seed), colors(seed + 100)[..., 0]
    data = saved(Image.fromarray(np.dstack([rgb, alpha])), "WEBP", lossless=True, exact=True)
    return data, on_white(rgb, alpha)


@maker
def webp_animated(seed: int) -> Made:
    first, second = (Image.fromarray(colors(seed + more)) for more in (0, 200))
    return saved(first, "WEBP", save_all=True, append_images=[second], lossless=True), np.asarray(first)


@maker
def heic_with_alpha(seed: int) -> Made:
    return with_alpha(seed, "HEIF", chroma=444)


@maker
def avif_with_alpha(seed: int) -> Made:
    return with_alpha(seed, "AVIF", speed=10, subsampling="4:4:4")


def with_alpha(seed: int, form: str, **options: Any) -> Made:
    data = saved(Image.fromarray(np.dstack([colors(seed), colors(seed + 100)[..., 0]])), form, quality=95, **options)
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    return data, on_white(pixels[..., :3], pixels[..., 3])


@maker
def heic_of_10_bits(seed: int) -> Made:
    rgb = colors(seed)
    file = io.BytesIO()
    pillow_heif.from_bytes("RGB;16", SIZE, (rgb.astype(np.uint16) << 8).tobytes()).save(file, quality=95)
    return file.getvalue(), decoded(file.getvalue())


@maker
def heic_turned_by_its_own_rotation(seed: int) -> Made:
    """Its EXIF orientation says the same and must be ignored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.fromarray(colors(seed)), "HEIF", quality=95, exif=exif)
    return data, decoded(data)


@maker
def avif_turned_by_its_own_rotation(seed: int) -> Made:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.fromarray(colors(seed)), "AVIF", quality=95, speed=10, exif=exif)
    return data, np.rot90(decoded(data), -1)


@maker
def avif_animated(seed: int) -> Made:
    first, second = (Image.fromarray(colors(seed + more)) for more in (0, 200))
    options: dict[str, Any] = {"quality": 95, "speed": 10}
    data = saved(first, "AVIF", save_all=True, append_images=[second], **options)
    return data, decoded(data)


@maker
def heic_of_several_images(seed: int) -> Made:
    first, second = (Image.fromarray(colors(seed + more)) for more in (0, 200))
    data = saved(first, "HEIF", quality=95, save_all=True, append_images=[second], primary_index=1)
    return data, decoded(data)
