"""Hides from a program under test what the tests need and the service does not, so that it starts as it does in production.

TensorFlow and Keras import these packages wherever they find them, which nearly doubles the time of a start.
"""

import os
import sys

if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
    for name in ("jax", "matplotlib", "scipy", "sklearn"):
        sys.modules[name] = None  # type: ignore[assignment]
