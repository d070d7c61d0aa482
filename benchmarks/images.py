"""The images that the benchmarks send and decode: synthetic, with the file size and the detail of photos."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from samples import saved

LOADS = ("png-432kB", "jpeg-90kB", "jpeg-12MP")  # sent to the service; the others are only decoded
PHOTO = (640, 480)  # width, height
SCREEN = (2000, 1500)


def scene(width: int, height: int, grain: float) -> Image.Image:
    """Return a smooth image with detail at every scale, like a photo, and `grain` (0 to 255) of noise."""
    rng = np.random.default_rng(7)
    total: npt.NDArray[np.float64] = np.zeros((height, width, 3))
    for cells, weight in ((4, 90.0), (16, 40.0), (64, 18.0), (256, 7.0)):
        coarse = rng.uniform(-1, 1, (cells * 3 // 4, cells, 3))
        for channel in range(3):
            layer = Image.fromarray(coarse[:, :, channel].astype(np.float32))
            total[:, :, channel] += weight * np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.normal(0, grain, (height, width, 1))
    return Image.fromarray(np.clip(total + noise + 128, 0, 255).astype(np.uint8))


def screenshot() -> Image.Image:
    """Return a white page of text with two pictures in it, of SCREEN's size."""
    page = Image.new("RGB", SCREEN, "white")
    draw = ImageDraw.Draw(page)
    for line, top in enumerate(range(20, SCREEN[1] - 20, 16)):
        draw.text((40, top), f"{line:3} A line of a page, long enough to fill it. " * 6, fill=(30, 30, 90))
    page.paste(scene(700, 400, 0), (1200, 100))
    page.paste(scene(500, 300, 2), (200, 900))
    return page


def _photo_png() -> bytes:
    return min((saved(scene(*PHOTO, grain), "PNG") for grain in np.arange(0, 6, 0.5)), key=_far_from(432_000))


def _photo_jpeg() -> bytes:
    photo = scene(800, 600, 4)
    return min((saved(photo, "JPEG", quality=quality) for quality in range(60, 97, 4)), key=_far_from(90_000))


def _transparent() -> Image.Image:
    photo = scene(*PHOTO, 2).convert("RGBA")
    photo.putalpha(Image.linear_gradient("L").resize(PHOTO))
    return photo


IMAGES: dict[str, Callable[[], bytes]] = {
    "png-432kB": _photo_png,
    "jpeg-90kB": _photo_jpeg,
    "jpeg-12MP": lambda: saved(scene(4000, 3000, 4), "JPEG", quality=88),
    "png-screenshot": lambda: saved(screenshot(), "PNG"),
    "png-palette": lambda: saved(scene(*PHOTO, 2).quantize(), "PNG"),
    "png-rgba": lambda: saved(_transparent(), "PNG"),
    "png-gray": lambda: saved(scene(*PHOTO, 2).convert("L"), "PNG"),
    "webp-1600x1200": lambda: saved(scene(1600, 1200, 4), "WEBP", quality=80),
}


def image(name: str, directory: Path) -> Path:
    """Return the file of an image in `directory`; draw it first if it is missing, which takes up to 5 seconds."""
    path = directory / name
    if not path.exists():
        path.write_bytes(IMAGES[name]())
    return path


def _far_from(wanted: int) -> Callable[[bytes], int]:
    return lambda data: abs(len(data) - wanted)
