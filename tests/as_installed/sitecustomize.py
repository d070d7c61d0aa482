"""Hides packages of the tests from a program under test, so that it starts as fast as it does in production.

TensorFlow and Keras import these where they find them, which nearly doubles the time of a start.
"""

import os
import sys

if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
    for name in ("jax", "matplotlib", "scipy", "sklearn"):
        sys.modules[name] = None  # type: ignore[assignment]
