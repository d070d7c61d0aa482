"""The images that the benchmarks send: synthetic, with the file size and the detail of photos."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from samples import saved

SIZES = {"png-432kB": (640, 480), "jpeg-90kB": (800, 600), "jpeg-12MP": (4000, 3000)}  # width, height


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


def write_images(directory: Path) -> dict[str, Path]:
    """Write each image to `directory`; return the files by name."""
    paths = {}
    for name, size in SIZES.items():
        if name == "png-432kB":
            data = min((saved(scene(*size, grain), "PNG") for grain in np.arange(0, 6, 0.5)), key=_far_from(432_000))
        elif name == "jpeg-90kB":
            image = scene(*size, 4)
            data = min((saved(image, "JPEG", quality=q) for q in range(60, 97, 4)), key=_far_from(90_000))
        else:
            data = saved(scene(*size, 4), "JPEG", quality=88)
        paths[name] = directory / name
        paths[name].write_bytes(data)
    return paths


def _far_from(wanted: int) -> Callable[[bytes], int]:
    return lambda data: abs(len(data) - wanted)
