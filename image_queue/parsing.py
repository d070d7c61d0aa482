"""Parses JSON that anybody may have written to Redis."""

import json
from typing import Any


def parse_object(text: bytes | str) -> dict[str, Any]:
    """Return the JSON object in `text`, or an empty one if there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {}
