"""Decode and resize an image file: with the service's code, and with plain Pillow, which every ratio compares with."""

import io
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from web.image_preparation import open_image, prepare_image

Pixels = npt.NDArray[np.uint8]

TARGET = (224, 224)
LEAST_DRAFT = (292, 292)  # 1.3 times the target, as in the service


def service(data: bytes) -> Pixels:
    """Return the pixels (height, width, 3) that the service sends to its model server."""
    return np.asarray(prepare_image(open_image(io.BytesIO(data)), TARGET), np.uint8)


def plain(data: bytes, draft: bool = True) -> Pixels:
    """Return the pixels (height, width, 3) by Pillow alone; without `draft`, a JPEG is decoded at its full size."""
    image = Image.open(io.BytesIO(data))
    if draft:
        image.draft(None, LEAST_DRAFT)
    return np.asarray(image.convert("RGB").resize(TARGET, Image.Resampling.BICUBIC), np.uint8)
