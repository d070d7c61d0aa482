"""The models of MODELS, checked. bin/serve calls chosen(); bin/install runs this program, which prints their names."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import settings
from helpers import StartupError, model_name
from image_queue.models import queue_key


def chosen() -> dict[str, str]:
    """Return the models of MODELS by name, with absolute paths; an empty dict if it is not set. Raises StartupError."""
    found: dict[str, str] = {}
    for model in settings.models():
        name = model_name(model)
        if name in found:
            raise StartupError(f"MODELS has two models named {name}: rename one, since its name is in the URLs.")
        queue_key(name)  # raises StartupError if no model may have this name
        found[name] = str(Path(model).resolve()) if Path(model).is_file() else model
    if found and settings.DEFAULT_MODEL and settings.DEFAULT_MODEL not in found:
        raise StartupError(f"DEFAULT_MODEL={settings.DEFAULT_MODEL} is invalid: it must be one of {', '.join(found)}.")
    return found


def main() -> None:
    """Print the name of each model."""
    try:
        names = list(chosen())
    except StartupError as error:
        sys.exit(str(error))
    for name in names:
        if name.isdecimal():
            sys.exit(f"MODELS has a model named {name}: rename it, since model-server@{name} is the unit of a GPU.")
        print(name)


if __name__ == "__main__":
    main()
