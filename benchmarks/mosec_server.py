"""mosec, a model server written in Rust, with the work that the service has under the costless model.

    mosec_server.py --port PORT

POST /predict takes the same bytes as the service. Two processes decode and resize with plain Pillow, as most programs
do; one more computes batches of up to 32. The model is the softmax of one pixel, as in costless.py, but in NumPy: even
this model costs the service a call of Keras' backend, so the comparison favors mosec.
"""

from typing import Any

import numpy as np
from decoding import Pixels, plain
from mosec import Server, Worker

DECODERS = 2
MAX_BATCH = 32
MAX_WAIT_MS = 1  # until a batch is computed although it is not full; 0 would mean mosec's default, 10
LABELS = ("red", "green", "blue")


class Decode(Worker):  # type: ignore[misc]  # mosec has no types
    """From a form to pixels."""

    def deserialize(self, data: bytes) -> bytes:
        """Return the file in a form with a single field; mosec hands on the body without its headers."""
        boundary, _, rest = data.partition(b"\r\n")
        return rest[rest.index(b"\r\n\r\n") + 4 : rest.rindex(b"\r\n" + boundary)]

    def forward(self, data: bytes) -> Pixels:
        """Return the pixels (224, 224, 3) of an image file."""
        return plain(data)


class Classify(Worker):  # type: ignore[misc]
    """From pixels to predictions."""

    def forward(self, data: list[Pixels]) -> list[dict[str, Any]]:
        """Return the predictions for a batch of pixels, each (224, 224, 3)."""
        powers = np.exp(np.stack(data)[:, 0, 0].astype(np.float32) / 255)
        return [predictions(row / row.sum()) for row in powers]


def predictions(probabilities: Any) -> dict[str, Any]:
    """Return the body of the service's response for the probabilities (3) of an image."""
    best = sorted(zip(LABELS, map(float, probabilities), strict=True), key=lambda pair: -pair[1])
    return {"success": True, "predictions": [{"label": label, "probability": value} for label, value in best]}


if __name__ == "__main__":
    server = Server()
    server.append_worker(Decode, num=DECODERS, route="/predict")
    server.append_worker(Classify, max_batch_size=MAX_BATCH, max_wait_time=MAX_WAIT_MS, route="/predict")
    server.run()
