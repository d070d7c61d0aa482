"""Flask that only decodes and resizes, behind the same Apache: what the service's plumbing is measured against."""

import io

import flask
import numpy as np
from PIL import Image

app = flask.Flask(__name__)


@app.get("/")
def homepage() -> str:
    """Say that the web is there."""
    return "decode only"


@app.post("/predict")
def predict() -> flask.Response:
    """Decode and resize, and answer in as many bytes as a prediction has."""
    image = Image.open(io.BytesIO(flask.request.files["image"].read()))
    image.draft(None, (224, 224))
    pixels = np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
    five = [{"label": f"class_{i}", "probability": int(pixels[i, i, 0]) / 256} for i in range(5)]
    return flask.jsonify({"success": True, "predictions": five})
