"""cykooz-resizer gives Pillow's result within a level, and Pillow resizes where it can't be used."""

import logging
import platform
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import samples
from PIL import Image

import settings
from helpers import Pixels
from web import image_colors, image_resizing
from web.image_colors import Rendering, resize
from web.image_resizing import FILTERS, library_shrink, shrinker

RNG = np.random.default_rng(4)
PICTURES: dict[str, samples.Array] = {
    "smooth": samples.colors(3, (700, 500)),
    "noise": RNG.integers(0, 256, (300, 401, 3), dtype=np.uint8),
    "black and white noise": RNG.integers(0, 2, (300, 401), dtype=np.uint8) * 255,
    "gray": samples.colors(4, (333, 250))[..., 1],
    "wide": samples.colors(5, (5000, 60)),
    "high": samples.colors(6, (60, 5000)),
    "white": np.full((300, 300, 3), 255, np.uint8),
}
TARGETS = [(1, 1), (50, 50), (60, 17), (17, 60)]
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="cykooz-resizer has wheels for x86-64 only")


def by_pillow(pixels: samples.Array, size: tuple[int, int], mode: str, resample: str) -> samples.Array:
    small = Image.fromarray(pixels).resize(size, Image.Resampling[resample.upper()]).convert(mode)
    return np.asarray(small).reshape(size[1], size[0], -1)


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("resample", FILTERS)
def test_the_result_is_within_a_level_or_two_of_pillows(
    name: str, resample: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "IMAGE_RESAMPLE", resample)
    image = Image.fromarray(PICTURES[name])

    for size in TARGETS:
        assert shrinker(image.size, size, resample)
        small = resize(image, size, "RGB", Rendering())

        difference = np.abs(small.astype(int) - by_pillow(PICTURES[name], size, "RGB", resample))
        assert difference.max() <= 2
        assert difference.mean() < 0.2


def test_pixels_and_images_give_the_same_result() -> None:
    for name, mode in (("smooth", "RGB"), ("smooth", "L"), ("gray", "RGB"), ("gray", "L")):
        pixels = PICTURES[name].reshape(*PICTURES[name].shape[:2], -1)

        of_pixels = resize(pixels, (50, 40), mode, Rendering())

        assert of_pixels.shape == (40, 50, 3 if mode == "RGB" else 1)
        assert np.array_equal(of_pixels, resize(Image.fromarray(PICTURES[name]), (50, 40), mode, Rendering()))


def test_strips_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = resize(PICTURES["smooth"], (50, 40), "RGB", Rendering())

    for pixels in (1, 700 * 7, 700 * 499):
        monkeypatch.setattr(image_resizing, "STRIP_PIXELS", pixels)
        assert np.array_equal(resize(PICTURES["smooth"], (50, 40), "RGB", Rendering()), whole)


@pytest.mark.parametrize(
    ("source", "target", "resample"),
    [((40, 40), (41, 40), "bicubic"), ((40, 40), (40, 41), "bicubic"), ((2**14 + 1, 400), (224, 224), "bicubic"),
     ((400, 400), (224, 224), "nearest"), ((400, 400), (224, 224), "box"), ((400, 400), (224, 224), "hamming")],
)  # fmt: skip
def test_pillow_makes_images_larger_and_has_the_other_filters(
    source: tuple[int, int], target: tuple[int, int], resample: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "IMAGE_RESAMPLE", resample)
    pixels = samples.colors(3, source)

    assert shrinker(source, target, resample) is None
    assert np.array_equal(resize(pixels, target, "RGB", Rendering()), by_pillow(pixels, target, "RGB", resample))


@pytest.fixture
def forgotten() -> Iterator[None]:
    """The library is loaded and checked again in this test, and after it."""
    library_shrink.cache_clear()
    yield
    library_shrink.cache_clear()


def expect_pillow(caplog: pytest.LogCaptureFixture, problem: str) -> None:
    pixels = PICTURES["smooth"]
    for _ in range(2):
        assert np.array_equal(
            resize(pixels, (50, 40), "RGB", Rendering()), by_pillow(pixels, (50, 40), "RGB", "bicubic")
        )
    [warning] = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert "Pillow resizes images, which takes longer" in warning.message
    assert problem in warning.message


@pytest.mark.usefixtures("forgotten")
def test_pillow_resizes_if_the_library_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "cykooz_resizer", None)

    expect_pillow(caplog, "cykooz_resizer")


@pytest.mark.usefixtures("forgotten")
def test_pillow_resizes_if_the_library_gives_another_result(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(*args: object) -> Pixels:
        return np.zeros((19, 23, 1), np.uint8)

    monkeypatch.setattr(image_resizing, "load_shrink", lambda name: wrong)

    expect_pillow(caplog, "it resizes a known image differently")


def test_transparent_and_16_bit_images_are_converted_strip_by_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    rgba = np.dstack([samples.colors(3), samples.colors(4)[..., 0]])
    deep = Image.fromarray(samples.colors(3)[..., 0].astype(np.uint16) * 257)
    for image in (Image.fromarray(rgba), deep):
        rendering = image_colors.rendering_of(image)
        expected = by_pillow(np.asarray(image_colors.convert(image, "RGB", rendering)), (50, 40), "RGB", "bicubic")
        monkeypatch.setattr(image_resizing, "STRIP_PIXELS", 3000)

        assert np.abs(resize(image, (50, 40), "RGB", rendering).astype(int) - expected).max() <= 1
