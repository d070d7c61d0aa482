"""Hides the tests' packages from a program under test, so that it starts as fast as in production.

TensorFlow and Keras import these packages if they are installed, which nearly doubles the time to start.
"""

import os
import sys

if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
    for name in ("jax", "matplotlib", "scipy", "sklearn"):
        sys.modules[name] = None  # type: ignore[assignment]
