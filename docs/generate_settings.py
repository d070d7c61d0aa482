"""Write docs/settings.md and .env.example from the declarations in settings.py. Run this after you change a setting."""

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import settings  # noqa: E402

INTRODUCTION = """\
# Settings

<!-- Written by docs/generate_settings.py from settings.py. Change a setting there, not here. -->

Set them as environment variables, or as `NAME=value` lines in a file `.env` beside `settings.py`. Both programs read
it, and the environment wins. `.env.example` is such a file with every default. An invalid value stops the program with
one line that says what is allowed. A misspelled name, such as `API_KEY=` in `.env`, has no effect, and the log asks
whether you meant the setting.

Keras has two more variables: `KERAS_BACKEND` (tensorflow, torch or jax) and `KERAS_HOME` (default `~/.keras`).
"""
EXAMPLE_HEAD = """\
# Settings: NAME=value lines, here with their defaults. Copy this file to .env and remove the # of the lines you change.
# docs/settings.md says more. After a change, touch keras_rest_api_app.wsgi and restart the model servers.
"""


def settings_page() -> str:
    """Return docs/settings.md: a table for each section."""
    lines = [INTRODUCTION]
    for heading, declared in settings.sections.items():
        lines += [f"## {heading}\n", "| name | default | unit | meaning | allowed |", "|---|---|---|---|---|"]
        lines += ["| " + " | ".join(cells(setting)) + " |" for setting in declared]
        lines.append("")
    return "\n".join(lines)


def cells(setting: settings.Setting) -> list[str]:
    """Return a row of the table."""
    name, default, unit, meaning, allowed = map(str, setting)
    return [f"`{name}`", default, unit, meaning, allowed]


def env_example() -> str:
    """Return .env.example: the settings of the two programs, commented out; not those of bin/serve."""
    lines = [EXAMPLE_HEAD]
    for heading, declared in settings.sections.items():
        if heading == "bin/serve only":
            continue
        lines.append(f"\n## {heading}\n")
        for setting in declared:
            lines += textwrap.wrap(explained(setting), 120, initial_indent="# ", subsequent_indent="# ")
            lines += [f"# {setting.name}={setting.default}", ""]
    return "\n".join(lines)


def explained(setting: settings.Setting) -> str:
    """Return the comment above a setting in .env.example."""
    text = f"{setting.meaning} Allowed: {setting.allowed}."
    unit = f" In {setting.unit}." if setting.unit and setting.unit not in text.lower() else ""
    return (text + unit).replace("`", "")


FILES = {"docs/settings.md": settings_page, ".env.example": env_example}

if __name__ == "__main__":
    for name, text in FILES.items():
        (ROOT / name).write_text(text(), encoding="utf-8")
