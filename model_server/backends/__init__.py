"""A Keras model as one compiled function, for each backend that Keras runs on."""

from model_server.backends.compile import compiled
from model_server.backends.network import Network, Output

__all__ = ["Network", "Output", "compiled"]
