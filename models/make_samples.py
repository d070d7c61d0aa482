"""Make the sample images of the digits model, from digits that training never saw.

    python models/make_samples.py

writes ``models/digits/`` and checks with ``models/digits.keras`` that each image is classified rightly and surely.
"""

import sys

import keras
import numpy as np
from PIL import Image
from train_digits import HERE, LABELS, render, served, split

IMAGES = HERE / "digits"
CONFIDENT = 0.9
# File, digit, presentation, and a seed picked by eye: it chooses whose digit it is and how it is drawn.
SAMPLES = (
    ("three.png", 3, "scan", 983),
    ("seven.jpg", 7, "photo", 208),
    ("five-inverted.png", 5, "inverted", 253),
    ("two.webp", 2, "photo", 966),
)


def draw(wanted: int, presentation: str, seed: int) -> Image.Image:
    """Return a PIL image of a held-out digit of the class ``wanted``."""
    rng = np.random.default_rng(seed)
    _, (digits, classes) = split()
    return render(rng.choice(digits[classes == wanted]), presentation, rng)


def main() -> None:
    """Write the images; exit with a message if the model doubts one of them."""
    model = keras.saving.load_model(HERE / "digits.keras")
    IMAGES.mkdir(exist_ok=True)
    for file, wanted, presentation, seed in SAMPLES:
        draw(wanted, presentation, seed).save(IMAGES / file, quality=90)
        # Read back, since JPEG and WebP do not keep every pixel.
        pixels = served(Image.open(IMAGES / file)).astype("float32")
        probability = model.predict(pixels[None], verbose=0)[0][wanted]
        print(f"{file}: {LABELS[wanted]} with probability {probability:.3f}")
        if probability < CONFIDENT:
            sys.exit(f"{file} is no good sample: pick another seed.")


if __name__ == "__main__":
    main()
