"""From a client's file to the pixels that the model gets."""

import io

import numpy as np
import pytest
import samples
from PIL import Image
from samples import colours, saved

import image_preparation as preparation
import settings
from helpers import Pixels

TARGET = (224, 224)


def prepare(data: bytes, target: tuple[int, int] = TARGET, channels: int = 3) -> Pixels:
    return preparation.prepare_image(preparation.open_image(io.BytesIO(data)), target, channels)


def resized(pixels: samples.Array, target: tuple[int, int] = TARGET) -> samples.Array:
    return np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.BICUBIC))


@pytest.mark.parametrize("sample", samples.samples(), ids=lambda sample: sample.name)
def test_every_format_and_mode_gives_its_pixels(sample: samples.Sample) -> None:
    prepared = prepare(sample.data)

    assert prepared.shape == (224, 224, 3)
    assert prepared.dtype == np.uint8
    # One level apart: rounding may come before or after the resize.
    assert np.abs(prepared.astype(int) - resized(sample.pixels)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(orientation: int) -> None:
    upright = colours(5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: np.rot90(upright[::-1]), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip

    prepared = prepare(saved(Image.fromarray(np.ascontiguousarray(turned)), "PNG", exif=exif))

    assert np.abs(prepared.astype(int) - resized(upright)).max() <= 1


def test_a_damaged_exif_is_no_reason_to_refuse_a_photo() -> None:
    data = saved(Image.fromarray(colours(1)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xee" * 40)

    assert prepare(data).shape == (224, 224, 3)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_smaller_but_never_below_the_target(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    rgb = colours(3, (2400, 1000))
    data = saved(Image.fromarray(rgb), "JPEG", quality=95, exif=exif)
    image = preparation.open_image(io.BytesIO(data))

    prepared = preparation.prepare_image(image, (200, 400))

    # A half, turned upright: a quarter would be 250 high, below the 400 that may be asked of it.
    assert image.size == ((500, 1200) if orientation == 6 else (1200, 500))
    expected = resized(np.rot90(rgb, -1) if orientation == 6 else rgb, (200, 400))
    assert np.abs(prepared.astype(int) - expected).mean() < 2


def test_width_and_height_are_not_mixed_up() -> None:
    assert prepare(saved(Image.fromarray(colours(1)), "PNG"), (30, 20)).shape == (20, 30, 3)


def test_grey_and_float_are_made_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "IMAGE_DTYPE", "float32")

    prepared = prepare(saved(Image.fromarray(colours(1)), "PNG"), channels=1)

    assert prepared.shape == (224, 224, 1)
    assert prepared.dtype == np.float32
    assert prepared.max() > 1  # still 0 to 255


def test_the_resampling_filter_is_the_setting_s(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = np.indices((64, 64)).sum(axis=0) % 2 * 255
    data = saved(Image.fromarray(checks.astype(np.uint8)), "PNG")
    assert set(np.unique(prepare(data, (16, 16)))) != {0, 255}

    monkeypatch.setattr(settings, "IMAGE_RESAMPLE", "nearest")

    assert set(np.unique(prepare(data, (16, 16)))) <= {0, 255}


def test_values_that_are_no_numbers_do_not_hide_the_others() -> None:
    values = np.array([[0, 3e38, -3e38], [np.nan, np.inf, -np.inf]], np.float32)

    prepared = prepare(saved(Image.fromarray(values), "TIFF"), (3, 2))

    assert prepared[..., 0].tolist() == [[128, 255, 0], [0, 255, 0]]


WHOLE = saved(Image.fromarray(colours(2)), "PNG")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"hello", id="text"),
        pytest.param(b"\0" * 1000, id="zeros"),
        pytest.param(b"%PDF-1.4", id="pdf"),
        pytest.param(b"<svg/>", id="svg"),
        pytest.param(saved(Image.fromarray(colours(2)), "PPM"), id="a format that is not taken"),
        pytest.param(WHOLE[:8], id="only a signature"),
        pytest.param(WHOLE[:40], id="only a header"),
        pytest.param(WHOLE[:-3000], id="cut off"),
        pytest.param(b"\xff\xd8\xff\xe0" + b"x" * 99, id="rubbish behind a signature"),
        pytest.param(saved(Image.fromarray(colours(2)), "JPEG")[:2000], id="half a jpeg"),
    ],
)
def test_what_is_not_a_whole_image_is_a_bad_image(data: bytes) -> None:
    with pytest.raises(preparation.BadImage):
        prepare(data)


def test_an_empty_file_is_a_missing_image() -> None:
    with pytest.raises(preparation.MissingImage):
        prepare(b"")


@pytest.mark.parametrize("side", [101, 400])
def test_pixels_are_counted_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    monkeypatch.setattr(settings, "MAX_IMAGE_PIXELS", 100 * 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 100)
    header_only = saved(Image.new("RGB", (side, 100)), "PNG")[:60]

    with pytest.raises(preparation.TooLarge):
        prepare(header_only)
