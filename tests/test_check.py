"""run_model_server.py --check gives the same predictions and errors for a file as POST /predict."""

import io
import logging
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import ROOT, Service
from PIL import Image
from samples import saved

import run_model_server
import settings
from model_server import check as check_module
from model_server import classifier
from model_server.tray import resized

SEVEN = Image.open(ROOT / "models/digits/seven.jpg").convert("L").resize((300, 400))
WHITE_ON_BLACK = Image.eval(SEVEN, lambda level: 255 - level)
OTHER = Image.open(ROOT / "models/digits/three.png").convert("L").resize((300, 400))


def with_orientation(orientation: int, form: str = "JPEG") -> bytes:
    """The seven as a camera stores it: rotated, with the EXIF orientation that turns it upright."""
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270,
             5: Image.Transpose.TRANSPOSE}  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(SEVEN.transpose(turns[orientation]), form, exif=exif)


def ink_alone(mode: str) -> bytes:
    """The seven in black ink on a transparent background. It is all black if alpha is ignored."""
    black = Image.new(mode.rstrip("A") or "L", SEVEN.size, 0)
    black.putalpha(WHITE_ON_BLACK)
    return saved(black, "PNG")


def palette() -> bytes:
    image = SEVEN.convert("RGB").quantize(16)
    lightest = int(np.asarray(image).flat[0])
    return saved(image, "PNG", transparency=lightest)


def of_16_bits() -> Image.Image:
    return Image.fromarray(np.asarray(SEVEN).astype(np.uint16) * 257)


FILES: dict[str, Callable[[], bytes]] = {
    "exif3.jpg": lambda: with_orientation(3),
    "exif5.jpg": lambda: with_orientation(5),
    "exif6.jpg": lambda: with_orientation(6),
    "exif8.webp": lambda: with_orientation(8, "WEBP"),
    "transparent.png": lambda: ink_alone("RGBA"),
    "transparent-gray.png": lambda: ink_alone("LA"),
    "palette.png": palette,
    "16bit.png": lambda: saved(of_16_bits(), "PNG"),
    "16bit.tif": lambda: saved(of_16_bits(), "TIFF"),
    "float.tif": lambda: saved(Image.fromarray(np.asarray(SEVEN).astype(np.float32) * 9), "TIFF"),
    "cmyk.jpg": lambda: saved(SEVEN.convert("CMYK"), "JPEG"),
    "animated.gif": lambda: saved(SEVEN, "GIF", save_all=True, append_images=[OTHER]),
    "animated.webp": lambda: saved(SEVEN, "WEBP", save_all=True, append_images=[OTHER]),
    "1bit.png": lambda: saved(SEVEN.convert("1"), "PNG"),
    "large.jpg": lambda: saved(SEVEN.resize((3000, 4000)), "JPEG"),
    "an-image-with-another-suffix.txt": lambda: saved(SEVEN, "BMP"),
}  # fmt: skip
UNREADABLE: dict[str, Callable[[], bytes]] = {
    "text.png": lambda: b"no image",
    "empty.png": lambda: b"",
    "cut.png": lambda: saved(SEVEN, "PNG")[:5000],
    "long.png": lambda: saved(Image.new("1", (600_000, 1)), "PNG"),
}


@pytest.fixture(scope="module")
def digits() -> classifier.Classifier:
    """The digits model, loaded once."""
    before, settings.BATCH_SIZE = settings.BATCH_SIZE, 1
    try:
        model = classifier.load()
        model.warm_up()
    finally:
        settings.BATCH_SIZE = before
    return model


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, digits: classifier.Classifier) -> Callable[[Path], int]:
    """A function that runs run_model_server.py --check with the loaded model, and returns its exit code."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # keep the test run's own handlers
    monkeypatch.setattr(check_module, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(check_module, "load_model", lambda: digits)

    def run(path: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["run_model_server.py", "--check", str(path)])
        return run_model_server.main()

    return run


@pytest.mark.parametrize("name", FILES)
def test_check_predicts_what_the_service_predicts(
    service: Service, check: Callable[[Path], int], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name]())

    assert check(path) == 0

    [line] = [each for each in capsys.readouterr().out.splitlines() if each.startswith(str(path))]
    said = {label: float(number) for label, number in re.findall(r"(\d) ([\d.]+)", line.removeprefix(f"{path}: "))}
    answered = service.predictions(path.read_bytes())
    assert answered[0]["label"] == "7"
    assert said == pytest.approx({each["label"]: each["probability"] for each in answered}, abs=2e-4)


@pytest.mark.parametrize("name", UNREADABLE)
def test_check_refuses_what_the_service_refuses(
    service: Service, check: Callable[[Path], int], tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(UNREADABLE[name]())

    assert check(path) == 2

    [record] = [each for each in caplog.records if each.levelno >= logging.WARNING]
    message = service.post(path.read_bytes()).json()["error"]["message"]
    assert record.getMessage() == f"{path} can't be read as an image: {message}"


@pytest.mark.parametrize(("name", "what"), [("MAX_UPLOAD_BYTES", "file"), ("MAX_IMAGE_PIXELS", "image")])
def test_check_has_the_limits_of_the_service(
    monkeypatch: pytest.MonkeyPatch,
    check: Callable[[Path], int],
    caplog: pytest.LogCaptureFixture,
    name: str,
    what: str,
) -> None:
    monkeypatch.setattr(settings, name, 1000)

    assert check(ROOT / "models/digits/seven.jpg") == 2

    assert f"seven.jpg can't be read as an image: The {what} has more than" in caplog.text


def test_check_resizes_like_the_service(
    monkeypatch: pytest.MonkeyPatch, check: Callable[[Path], int], digits: classifier.Classifier, tmp_path: Path
) -> None:
    """The model server resizes like that too, if an image was queued for a model of another size."""
    monkeypatch.setattr(settings, "IMAGE_RESAMPLE", "nearest")
    path = tmp_path / "seven.png"
    SEVEN.save(path)
    seen: list[Any] = []

    def note(images: Any) -> list[Any]:
        seen.append(images)
        return [np.full(10, 0.1)]

    monkeypatch.setattr(digits, "classify", note)

    assert check(path) == 0

    height, width, _ = digits.shape
    expected = np.asarray(SEVEN.convert("RGB").resize((width, height), Image.Resampling.NEAREST))
    assert (seen[0][0] == expected).all()
    assert (resized(np.asarray(SEVEN.convert("RGB")), digits.shape) == expected).all()


@pytest.mark.parametrize("path", ["nowhere.png", "images"])
def test_a_missing_image_is_reported_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, check: Callable[[Path], int], caplog: pytest.LogCaptureFixture, path: str
) -> None:
    monkeypatch.setattr(check_module, "load_model", lambda: pytest.fail("the model was loaded"))

    assert check(Path(path)) == 2

    assert f"{path} can't be read as an image (" in caplog.text


def test_a_terminal_that_lacks_characters_gets_escapes(
    monkeypatch: pytest.MonkeyPatch, check: Callable[[Path], int], digits: classifier.Classifier
) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="latin-1"))
    monkeypatch.setattr(digits, "_labels", ["\u4e03", "caf\u00e9", *map(str, range(8))])
    monkeypatch.setattr(digits, "classify", lambda images: [np.array([0.6, 0.3, *[0.0125] * 8])] * len(images))

    assert check(ROOT / "models/digits/seven.jpg") == 0

    sys.stdout.flush()
    assert rb"seven.jpg: \u4e03 0.6000, caf" + b"\xe9 0.3000, " in printed.getvalue()
