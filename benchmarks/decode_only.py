"""Flask that only decodes and resizes, behind the same Apache: the baseline for the rest of the service."""

import flask
from decoding import service

app = flask.Flask(__name__)


@app.get("/")
def homepage() -> str:
    """Show that the web is up."""
    return "decode only"


@app.post("/predict")
def predict() -> flask.Response:
    """Decode and resize; answer with as many bytes as a prediction has."""
    pixels = service(flask.request.files["image"].read())
    five = [{"label": f"class_{i}", "probability": int(pixels[i, i, 0]) / 256} for i in range(5)]
    return flask.jsonify({"success": True, "predictions": five})
