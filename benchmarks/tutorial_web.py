"""The design of the 2018 tutorial, web side, written anew to be measured against: slow, and losing requests, as it was.

float32 pixels go onto a Redis list, and a poll every 0.25 s looks for the result. See README.md, "What differs".
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
    """Decode, resize and do the model's preprocessing, as the tutorial has the web do it."""
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((224, 224))
    batch = np.expand_dims(np.asarray(image, np.float32), 0)
    return np.ascontiguousarray(keras.applications.imagenet_utils.preprocess_input(batch))


@app.get("/")
def homepage() -> str:
    """Say that the service is there."""
    return "Welcome to the PyImageSearch Keras REST API!"


@app.post("/predict")
def predict() -> flask.Response:
    """Queue the image, and look every 0.25 s whether it has its result."""
    pixels = prepare_image(flask.request.files["image"].read())
    job = uuid.uuid4().hex
    db.rpush(QUEUE, json.dumps({"id": job, "image": base64.b64encode(pixels.tobytes()).decode()}))
    while True:
        output = db.get(job)
        if output is not None:
            db.delete(job)
            return flask.jsonify({"predictions": json.loads(output), "success": True})
        time.sleep(SLEEP)
