"""Compare decoding and resizing with Pillow alone, by turns in one process; print a line of JSON for each image.

    pillow_decode.py [IMAGE ...]    {"image": name, "pillow_ms": CPU, "now_ms": CPU, "ratio": now / Pillow}

Without arguments, it makes the images: photos, a screenshot, and one of each mode of PNG.
"""

import io
import json
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "tests")]

from samples import saved  # noqa: E402

from helpers import Pixels  # noqa: E402
from images import SIZES, scene  # noqa: E402
from web.image_colors import rendering_of, resize_with_pillow  # noqa: E402
from web.image_preparation import bytes_to_decode, open_image, orientation_of, prepare_image  # noqa: E402
from web.process import limit_malloc  # noqa: E402

TARGET = (224, 224)
ROUNDS = 31
WORDS = ["the", "queue", "takes", "images", "and", "answers", "with", "labels"]


def with_pillow(data: bytes) -> Pixels:
    """Prepare an image as prepare_image() did before it used other libraries than Pillow."""
    image = open_image(io.BytesIO(data))
    bytes_to_decode(image, TARGET)
    image.load()
    orientation_of(image)
    return np.asarray(resize_with_pillow(image, TARGET, "RGB", rendering_of(image)), dtype=np.uint8)


def now(data: bytes) -> Pixels:
    """Prepare an image as the service does."""
    return prepare_image(open_image(io.BytesIO(data)), TARGET)


def compare(data: bytes) -> dict[str, float]:
    """Return the median CPU of both ways, in ms, and the median of their ratios."""
    pairs = []
    for _ in range(ROUNDS + 2):  # the first two warm up
        times = []
        for prepare in (with_pillow, now):
            started = time.process_time()
            prepare(data)
            times.append(1000 * (time.process_time() - started))
        pairs.append(times)
    pillow, present = zip(*pairs[2:], strict=True)
    ratio = median(after / before for before, after in pairs[2:])
    return {"pillow_ms": median(pillow), "now_ms": median(present), "ratio": ratio}


def screenshot() -> Image.Image:
    """Return 2,000 x 1,500 pixels of text, plain areas, a gradient and a photo."""
    image = Image.new("RGB", (2000, 1500), (247, 248, 250))
    draw, font, rng = ImageDraw.Draw(image), ImageFont.load_default(17), np.random.default_rng(3)
    draw.rectangle((0, 0, 2000, 60), fill=(32, 40, 60))
    for y in range(80, 1480, 26):
        draw.text((20, y), " ".join(rng.choice(WORDS, 18)), fill=(20, 20, 20), font=font)
    image.paste(scene(560, 420, 3), (1400, 100))
    image.paste(Image.linear_gradient("L").resize((500, 300)), (1400, 600))
    return image


def images() -> dict[str, bytes]:
    """Return files like those that people send, by name."""
    photo = scene(1000, 800, 3)
    clear = photo.copy()
    clear.putalpha(Image.linear_gradient("L").resize(photo.size))
    return {
        "PNG photo, 640x480": saved(scene(*SIZES["png-432kB"], 1), "PNG"),
        "JPEG photo, 800x600": saved(scene(*SIZES["jpeg-90kB"], 4), "JPEG", quality=88),
        "PNG screenshot, 2000x1500": saved(screenshot(), "PNG"),
        "JPEG photo, 4000x3000": saved(scene(*SIZES["jpeg-12MP"], 4), "JPEG", quality=88),
        "WebP photo, 1000x800": saved(photo, "WEBP"),
        "PNG with a palette, 1000x800": saved(photo.quantize(256), "PNG"),
        "PNG with alpha, 1000x800": saved(clear, "PNG"),
        "PNG, gray, 1000x800": saved(photo.convert("L"), "PNG"),
    }


def main() -> None:
    """Compare the images named on the command line, or those of images()."""
    limit_malloc()
    files = {Path(path).name: Path(path).read_bytes() for path in sys.argv[1:]} or images()
    for name, data in files.items():
        print(json.dumps({"image": name} | compare(data)), flush=True)


if __name__ == "__main__":
    main()
