"""All cases of all formats, each named by its format and what is odd about it."""

from functools import partial
from types import ModuleType

from hostile import avif, bmp, gif, heic, jpeg, other, png, tiff, webp
from hostile.parts import Maker, cut, written

PLAIN = {"PNG": png, "JPEG": jpeg, "GIF": gif, "BMP": bmp, "TIFF": tiff, "WEBP": webp}
HEIF = {"HEIC": heic, "AVIF": avif}


def table(kind: str, formats: dict[str, ModuleType]) -> dict[str, Maker]:
    """Join these formats' tables called `kind`."""
    return {f"{form}: {name}": make for form, module in formats.items() for name, make in getattr(module, kind).items()}


def of_sizes(form: str) -> dict[str, Maker]:
    sizes = ((1, 1), (1, 200), (3000, 1))
    return {f"{form}: {width} x {height} pixels": written("RGB", form, (width, height)) for width, height in sizes}


def of_modes(form: str) -> dict[str, Maker]:
    return {f"{form}: mode {mode}": written(mode, form) for mode in ("L", "LA", "RGBA")}


def cut_off(form: str) -> dict[str, Maker]:
    return {f"{form}: cut off at {percent}%": partial(cut, written("RGB", form), percent) for percent in (10, 50, 90)}


# The order determines the seeds of the mutants, so a change of it changes all mutants.
READABLE = {name: make for form in PLAIN for name, make in of_sizes(form).items()}
READABLE |= table("READABLE", PLAIN)
READABLE |= {name: make for form in HEIF for name, make in (of_sizes(form) | of_modes(form)).items()}
READABLE |= table("READABLE", HEIF) | other.READABLE

BROKEN = {name: make for form in PLAIN | HEIF for name, make in cut_off(form).items()}
BROKEN |= table("BROKEN", PLAIN | HEIF) | other.BROKEN
ODD = {name: (make, 200) for name, make in READABLE.items()} | {name: (make, 400) for name, make in BROKEN.items()}

BOMBS = table("BOMBS", PLAIN | HEIF)
HARMLESS_BOMBS = table("HARMLESS_BOMBS", PLAIN | HEIF)
