"""Make the sample images of the digits model from held-out digits.

    python models/make_samples.py

writes `models/digits/` and checks that `models/digits.keras` classifies each image correctly and confidently.
"""

import sys

import keras
import numpy as np
from PIL import Image
from train_digits import HERE, LABELS, render, served, split

IMAGES = HERE / "digits"
CONFIDENT = 0.9
# File, digit, presentation, and a seed that chooses the digit and how it is drawn. The seeds were picked by eye.
SAMPLES = (
    ("three.png", 3, "scan", 983),
    ("seven.jpg", 7, "photo", 208),
    ("five-inverted.png", 5, "inverted", 253),
    ("two.webp", 2, "photo", 966),
)


def draw(digit: int, presentation: str, seed: int) -> Image.Image:
    """Return a PIL image of a held-out digit of the class `digit`."""
    rng = np.random.default_rng(seed)
    _, (digits, classes) = split()
    return render(rng.choice(digits[classes == digit]), presentation, rng)


def main() -> None:
    """Write the images; exit with a message if the model is not confident of one."""
    model = keras.saving.load_model(HERE / "digits.keras")
    IMAGES.mkdir(exist_ok=True)
    for file, digit, presentation, seed in SAMPLES:
        draw(digit, presentation, seed).save(IMAGES / file, quality=90)
        # Read the file again, since JPEG and WebP change pixels.
        pixels = served(Image.open(IMAGES / file)).astype("float32")
        probability = model.predict(pixels[None], verbose=0)[0][digit]
        print(f"{file}: {LABELS[digit]} with probability {probability:.3f}")
        if probability < CONFIDENT:
            sys.exit(f"{file} is a bad sample: pick another seed.")


if __name__ == "__main__":
    main()
