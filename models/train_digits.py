"""Train a small classifier of handwritten digits, as an example of your own model.

    python models/train_digits.py

writes `models/digits.keras`, `models/digits.labels.txt` (one class per line) and `models/digits.json`, and prints
its accuracy on held-out digits. It takes about 14 minutes on one CPU core, less on two.

Data: "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (1998), UCI Machine Learning
Repository, CC BY 4.0, https://doi.org/10.24432/C50P49. scikit-learn's `load_digits` contains its test part:
1797 digits by 13 writers, each an 8x8 array of ink counts from 0 (blank) to 16 (covered). The held-out digits
are by the same writers, so the printed accuracy does not cover other people's handwriting.

Each digit is drawn in a way that users might post it: see `PRESENTATIONS`.
"""

import argparse
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

Array = npt.NDArray[Any]
Digits = tuple[Array, Array]  # digits (n, 8, 8) and their classes (n,)

HERE = Path(__file__).parent
LABELS = tuple("0123456789")
DESCRIPTION = "handwritten digits"
SEED = 1998
FULL_INK = 16  # ink count of a covered pixel in the data set
SIDE = 224  # pixels: the service resizes every picture to a square of this side
BLOCK = 7  # pixels: the model's first layer averages blocks of 7x7 pixels to 32x32
COPIES = 48  # pictures of each training digit: with fewer copies and more epochs the model overfits
EPOCHS = 10


def split() -> tuple[Digits, Digits]:
    """Return `(train, held_out)`, each a pair of digits (n, 8, 8), 0..16, and classes (n,), 0..9.

    The split is stratified and always the same: 1347 digits for training and validation, 450 held out.
    """
    data = load_digits()
    return set_aside(450, data.images, data.target)


def set_aside(count: int, digits: Array, classes: Array) -> tuple[Digits, Digits]:
    """Return `(rest, aside)`, pairs of digits and classes, with `count` digits in `aside`, stratified."""
    rest, aside, rest_classes, aside_classes = train_test_split(
        digits, classes, test_size=count, stratify=classes, random_state=SEED
    )
    return (rest, rest_classes), (aside, aside_classes)


def render(digit: Array, presentation: str, rng: np.random.Generator) -> Image.Image:
    """Return an 8x8 digit (0..16) as a PIL image, "L" or "RGB", in one of the `PRESENTATIONS`.

    `rng` decides the size, place, colors and so on.
    """
    return PRESENTATIONS[presentation](digit, rng)


def served(image: Image.Image) -> Array:
    """Return a picture as the service passes it to a model: (224, 224, 3), uint8, with a changed aspect ratio."""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def raw(digit: Array, rng: np.random.Generator) -> Image.Image:
    """Return the bare 8x8 pixels, light on dark as in the data set."""
    return as_image(digit)


def scan(digit: Array, rng: np.random.Generator) -> Image.Image:
    """Return a gray picture 20 to 1000 pixels high: dark ink, white paper, margins."""
    mask = place(digit, log_uniform(rng, 20, 1000), rng.uniform(0.6, 1), rng)
    ink, paper = rng.uniform(0, 70), rng.uniform(225, 255)
    return mask.point(lambda level: paper + (ink - paper) * level / 255)


def inverted(digit: Array, rng: np.random.Generator) -> Image.Image:
    """Return a scan's negative: light ink, dark paper."""
    return ImageOps.invert(scan(digit, rng))


def photo(digit: Array, rng: np.random.Generator) -> Image.Image:
    """Return an RGB snapshot 100 to 400 pixels high.

    Tinted paper, colored ink, a smaller, tilted digit anywhere on the page, uneven light, blur, noise, JPEG.
    """
    height = log_uniform(rng, 100, 400)
    mask = place(digit, height, rng.uniform(0.45, 0.85), rng, tilt=rng.uniform(-12, 12))
    mask = mask.filter(ImageFilter.GaussianBlur(height * rng.uniform(0, 0.012)))
    ink, paper = rng.integers(0, 110, 3).tolist(), rng.integers(190, 256, 3).tolist()
    light = Image.fromarray(rng.uniform(0.5, 1, (2, 2)).astype("float32")).resize(mask.size, Image.Resampling.BICUBIC)
    pixels = np.asarray(ImageOps.colorize(mask, paper, ink)) * np.asarray(light)[..., None]
    pixels += rng.uniform(0, 12) * rng.standard_normal(pixels.shape, "float32")
    return as_jpeg(Image.fromarray(np.uint8(pixels.clip(0, 255))), quality=int(rng.integers(40, 95)))


Presentation = Callable[[Array, np.random.Generator], Image.Image]
PRESENTATIONS: dict[str, Presentation] = {"raw": raw, "scan": scan, "inverted": inverted, "photo": photo}


def place(digit: Array, height: float, share: float, rng: np.random.Generator, tilt: float = 0) -> Image.Image:
    """Return a gray page, 255 where ink is. The digit takes `share` of the shorter side, tilted by `tilt` degrees.

    Neither pages nor digits are square, since the service squeezes every picture into a square.
    """
    page = Image.new("L", (round(height * log_uniform(rng, 0.7, 1.4)), round(height)))
    tall = share * min(page.size)
    drawn = draw(digit, (round(tall * rng.uniform(0.75, 1)), round(tall)), rng)
    drawn = drawn.rotate(tilt, Image.Resampling.BICUBIC, expand=True)
    corner = rng.uniform(0, 1, 2) * np.maximum(np.subtract(page.size, drawn.size), 0)
    page.paste(drawn, corner.astype(int).tolist())
    return page


def draw(digit: Array, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Return the digit enlarged to `size` (width, height), blurred like a thumbnail or crisp like ink."""
    kinds = Image.Resampling
    upscaler = rng.choice([kinds.NEAREST, kinds.BILINEAR, kinds.BICUBIC, kinds.LANCZOS])
    gain = log_uniform(rng, 1, 4)
    # With a blank border, a stroke that touches the edge ends round, not cut off flat.
    return as_image(np.pad(digit, 1)).resize(size, upscaler).point(lambda level: (level - 115) * gain + 115)


def as_image(digit: Array) -> Image.Image:
    """Return a digit (n, n), 0..16, as a gray image of n x n pixels with white ink."""
    return Image.fromarray(np.uint8(digit * (255 / FULL_INK)))


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Return the image with the artifacts of JPEG compression."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Return a random number from `low` to `high`, uniform on a logarithmic scale."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def warp(digit: Array, rng: np.random.Generator) -> Array:
    """Return a distorted 8x8 digit, as another person might write it, with its ink counted again."""
    corners = np.array([[0, 0], [0, 32], [32, 32], [32, 0]]) + rng.uniform(-4, 4, (4, 2))
    bitmap = as_image(digit).resize((32, 32), Image.Resampling.BICUBIC)
    bitmap = bitmap.transform((32, 32), Image.Transform.QUAD, corners.ravel().tolist(), Image.Resampling.BICUBIC)
    # Sharpen before counting, like the data set's bitmaps. Otherwise each warp would blur the strokes.
    return np.asarray(bitmap.point(lambda level: (level - 85) * 2).reduce(4)) * (FULL_INK / 255)


def pictures(digits: Array, classes: Array, copies: int, rng: np.random.Generator, warped: float) -> Digits:
    """Draw each digit `copies` times in alternating presentations; `warped` is the share of drawings to warp.

    Return the pictures' block means (n, 32, 32, 3), uint8, since whole pictures would not fit in memory, and
    their classes (n,).
    """
    names = list(PRESENTATIONS)
    jobs = [(digit, names[copy % len(names)]) for copy in range(copies) for digit in digits]
    pixels = np.empty((len(jobs), SIDE // BLOCK, SIDE // BLOCK, 3), "uint8")
    for row, (digit, name) in zip(pixels, tqdm(jobs, "Drawing", unit=" pictures"), strict=True):
        drawn = warp(digit, rng) if rng.random() < warped else digit
        row[:] = Image.fromarray(served(render(drawn, name, rng))).reduce(BLOCK)
    return pixels, np.tile(classes, copies)


def network() -> Any:
    """Return the untrained network, from block means (n, 32, 32, 3), 0..255, to probabilities (n, 10)."""
    from keras import Input, Sequential, layers

    def convolution(filters: int, kernel: int = 3, strides: int = 1) -> Iterator[Any]:
        yield layers.Conv2D(filters, kernel, strides, padding="same", use_bias=False)
        yield layers.BatchNormalization()
        yield layers.ReLU()

    return Sequential(
        [
            Input((SIDE // BLOCK, SIDE // BLOCK, 3)),
            layers.Rescaling(1 / 255),
            # Normalize brightness and contrast, so that a dim photo looks like a clean scan.
            layers.LayerNormalization(axis=(1, 2, 3), center=False, scale=False),
            *convolution(24, kernel=5, strides=2),
            *convolution(32),
            *convolution(48),
            layers.MaxPooling2D(),
            *convolution(64),
            *convolution(96),
            layers.MaxPooling2D(),
            *convolution(128),
            layers.GlobalAveragePooling2D(),
            layers.Dropout(0.3),
            layers.Dense(len(LABELS), activation="softmax"),
        ]
    )


def fit(trained: Any, learning: Digits, validation: Digits, epochs: int, batch: int = 128) -> None:
    """Train on pairs of block means and classes; report on `validation` after every epoch."""
    from keras import losses, optimizers

    # The learning rate falls to 0 along a cosine, so the last epoch is the best.
    rate = optimizers.schedules.CosineDecay(2e-3, epochs * -(-len(learning[0]) // batch))
    trained.compile(
        optimizers.AdamW(rate, weight_decay=0.01),
        loss=losses.CategoricalCrossentropy(label_smoothing=0.05),
        metrics=["accuracy"],
    )
    one_hot = np.eye(len(LABELS))
    (pixels, classes), (checks, expected) = learning, validation
    trained.fit(pixels, one_hot[classes], batch, epochs, validation_data=(checks, one_hot[expected]))


def train(epochs: int) -> Any:
    """Return the bundled digits model, from pixels (n, 224, 224, 3), 0..255, to probabilities (n, 10)."""
    import keras

    keras.utils.set_random_seed(SEED)
    rng = np.random.default_rng(SEED)
    learning, validation = set_aside(135, *split()[0])
    learning = pictures(*learning, COPIES, rng, warped=0.7)
    validation = pictures(*validation, 8, rng, warped=0)
    trained = network()
    fit(trained, learning, validation, epochs)
    # A new, flat model, so that the file has no nested model and no state of the optimizer.
    pooling = keras.layers.AveragePooling2D(BLOCK)
    return keras.Sequential([keras.Input((SIDE, SIDE, 3)), pooling, *trained.layers], name="digits")


def accuracy(model: Any, presentation: str, rng: np.random.Generator, draws: int = 5) -> float:
    """Return the share of held-out digits, each drawn `draws` times, that the model classifies correctly."""
    _, (digits, classes) = split()
    shares = []
    for _ in range(draws):  # one at a time, since a draw of all digits takes 270 MB
        pixels = np.stack([served(render(digit, presentation, rng)) for digit in digits]).astype("float32")
        shares.append(np.mean(model.predict(pixels, verbose=0).argmax(1) == classes))
    return float(np.mean(shares))


def main() -> None:
    """Train, save, and print the accuracy for every presentation."""
    parser = argparse.ArgumentParser(description="Train the digits classifier that is bundled with the service.")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the pictures (default: %(default)s)")
    files = "the model's file; the labels go beside it as .labels.txt and .json (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=HERE / "digits.keras", help=files)
    options = parser.parse_args()
    model = train(options.epochs)
    model.save(options.out)
    options.out.with_suffix(".labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    about = {"description": DESCRIPTION, "preprocessing": "none", "labels": f"{options.out.stem}.labels.txt"}
    options.out.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
    rng = np.random.default_rng(SEED + 1)
    for name in PRESENTATIONS:
        print(f"{name}: {accuracy(model, name, rng):.2%} of the held-out digits")


if __name__ == "__main__":
    main()
