"""Train the small digit classifier that the service bundles.

    python models/train_digits.py

writes ``models/digits.keras`` and ``models/digits.labels.txt`` (one class a line) and prints the accuracy on digits that
training never saw. It takes about ten minutes on two CPU cores.

Data: "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (1998), UCI Machine Learning Repository,
CC BY 4.0, https://doi.org/10.24432/C50P49; scikit-learn's ``load_digits`` carries its test part: 1797 digits by 13
writers. A digit is an 8x8 array of ink counts from 0 (blank) to 16 (covered). The held-out digits are by the same writers,
so the printed accuracy is that of familiar hands.

Users do not post 8x8 arrays, so each digit is rendered as a picture they might post: see ``PRESENTATIONS``.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

SEED = 1998
SIDE = 224  # pixels: what the service resizes every picture to
POOL = 7  # the model's first layer averages 7x7 blocks, which leaves 32x32
COPIES = 32  # renderings of each training digit
EPOCHS = 16
FULL_INK = 16
UPSCALERS = (Image.NEAREST, Image.BILINEAR, Image.BICUBIC, Image.LANCZOS)
LABELS = tuple("0123456789")
HERE = Path(__file__).parent


def split():
    """Return ``(train, held_out)``, each a pair of digits (n, 8, 8), 0..16, and classes (n,), 0..9.

    Stratified and always the same: 1347 digits to train on (and to choose settings by) and 450 held out.
    """
    data = load_digits()
    return stratified(data.images, data.target, 450)


def stratified(digits, classes, count):
    """Set ``count`` digits aside in the classes' proportions; return ``(rest, aside)`` as pairs of digits and classes."""
    rest, aside, rest_classes, aside_classes = train_test_split(
        digits, classes, test_size=count, stratify=classes, random_state=SEED
    )
    return (rest, rest_classes), (aside, aside_classes)


def render(digit, presentation, rng):
    """Return an 8x8 digit (0..16) as a PIL image, "L" or "RGB", in one of ``PRESENTATIONS``, at a size of its own."""
    return PRESENTATIONS[presentation](digit, rng)


def served(image):
    """Return the picture as the service feeds it to a model: (224, 224, 3), uint8, aspect ratio not kept."""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.BICUBIC))


def as_grey(digit):
    """Return an 8x8 digit as a grey image, ink white."""
    return Image.fromarray(np.uint8(digit * (255 / FULL_INK)))


def raw(digit, rng):
    """Return the bare 8x8 pixels, light on dark as in the data set."""
    return as_grey(digit)


def scan(digit, rng):
    """Return dark ink on white paper, 20 to 1000 pixels high, with margins."""
    mask = place(digit, log_uniform(rng, 20, 1000), rng.uniform(0.5, 0.95), rng)
    return paint(mask, ink=rng.integers(0, 70), paper=rng.integers(225, 256))


def inverted(digit, rng):
    """Return light ink on a dark ground, 20 to 1000 pixels high, with margins."""
    mask = place(digit, log_uniform(rng, 20, 1000), rng.uniform(0.5, 0.95), rng)
    return paint(mask, ink=rng.integers(186, 256), paper=rng.integers(0, 31))


def photo(digit, rng):
    """Return a snapshot: tinted paper, coloured ink, a small tilted digit off the centre, uneven light, blur, noise."""
    height = log_uniform(rng, 120, 480)
    mask = place(digit, height, rng.uniform(0.4, 0.8), rng, tilt=rng.uniform(-12, 12))
    page = paint(mask, ink=tuple(rng.integers(0, 110, 3)), paper=tuple(rng.integers(190, 256, 3)))
    page = page.filter(ImageFilter.GaussianBlur(height * rng.uniform(0, 0.012)))
    light = Image.fromarray(rng.uniform(0.5, 1, (3, 3)).astype("float32")).resize(page.size, Image.BICUBIC)
    pixels = np.asarray(page) * np.asarray(light)[..., None]
    pixels += rng.uniform(0, 12) * rng.standard_normal(pixels.shape, "float32")
    return as_jpeg(Image.fromarray(np.uint8(pixels.clip(0, 255))), quality=int(rng.integers(40, 95)))


PRESENTATIONS = {"raw": raw, "scan": scan, "inverted": inverted, "photo": photo}


def place(digit, height, share, rng, tilt=0):
    """Return a mask of the page's size, 255 where ink is: the digit takes ``share`` of the height, tilted by degrees.

    Neither page nor digit is square in general, since the service squeezes every picture into a square.
    """
    page = Image.new("L", (round(height * log_uniform(rng, 0.7, 1.4)), round(height)))
    tall = share * min(page.size)
    pen = stroke(digit, (round(tall * rng.uniform(0.75, 1)), round(tall)), rng).rotate(tilt, Image.BICUBIC, expand=True)
    corner = [int(rng.integers(0, max(1, room - taken + 1))) for room, taken in zip(page.size, pen.size, strict=True)]
    page.paste(pen, corner)
    return page


def stroke(digit, size, rng):
    """Return the digit enlarged to ``size`` (width, height), its edge anything from soft to as crisp as a pen's."""
    # A blank border lets a stroke that touches the edge end round, not cut off flat.
    large = as_grey(np.pad(digit, 1)).resize(size, UPSCALERS[rng.integers(len(UPSCALERS))])
    gain = log_uniform(rng, 1, 4)
    return large.point([min(max(round((level - 110) * gain + 110), 0), 255) for level in range(256)])


def paint(mask, ink, paper):
    """Return a page of one ink on one paper, each a grey level or an RGB triple, 0..255."""
    mode = "RGB" if isinstance(ink, tuple) else "L"
    colours = [tuple(map(int, colour)) if mode == "RGB" else int(colour) for colour in (ink, paper)]
    ink, paper = (Image.new(mode, mask.size, colour) for colour in colours)
    return Image.composite(ink, paper, mask)


def as_jpeg(image, quality):
    """Return the image with the artefacts of one trip through JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def log_uniform(rng, low, high):
    """Return a number between ``low`` and ``high``, each doubling as likely as the next."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def warp(digit, rng):
    """Return another hand's version of an 8x8 digit: its corners pulled about, its ink counted anew."""
    corners = np.array([[0, 0], [0, 32], [32, 32], [32, 0]]) + rng.uniform(-4, 4, (4, 2))
    bitmap = as_grey(digit).resize((32, 32), Image.BICUBIC).transform((32, 32), Image.QUAD, corners.ravel(), Image.BICUBIC)
    return np.asarray(bitmap.point(lambda level: (level - 90) * 3).reduce(4)) * (FULL_INK / 255)
