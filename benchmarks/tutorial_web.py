"""A reconstruction of the 2018 tutorial's design, web side, as a baseline.

It is as slow as the original and loses requests as well: float32 pixels go onto a Redis list, and a poll every 0.25 s
looks for the result.
"""

import base64
import io
import json
import os
import time
import uuid

import flask
import keras
import numpy as np
from PIL import Image
from redis import Redis

QUEUE = "image_queue"
SLEEP = 0.25  # seconds

app = flask.Flask(__name__)
db = Redis(port=int(os.environ["REDIS_PORT"]), max_connections=1000)


def prepare_image(data: bytes) -> np.ndarray:
    """Decode, resize and apply the model's preprocessing; the tutorial does all three in the web."""
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((224, 224))
    batch = np.expand_dims(np.asarray(image, np.float32), 0)
    return np.ascontiguousarray(keras.applications.imagenet_utils.preprocess_input(batch))


@app.get("/")
def homepage() -> str:
    """Greet, as the tutorial does."""
    return "Welcome to the PyImageSearch Keras REST API!"


@app.post("/predict")
def predict() -> flask.Response:
    """Queue the image and poll for its result every 0.25 s."""
    pixels = prepare_image(flask.request.files["image"].read())
    job = uuid.uuid4().hex
    db.rpush(QUEUE, json.dumps({"id": job, "image": base64.b64encode(pixels.tobytes()).decode()}))
    while True:
        output = db.get(job)
        if output is not None:
            db.delete(job)
            return flask.jsonify({"predictions": json.loads(output), "success": True})
        time.sleep(SLEEP)
