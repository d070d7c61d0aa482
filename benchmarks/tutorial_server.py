"""A reconstruction of the 2018 tutorial's design, model side, as a baseline: see tutorial_web.py."""

import base64
import json
import os
import time
from typing import Any

import keras
import numpy as np
from redis import Redis

QUEUE = "image_queue"
BATCH_SIZE = 32
SLEEP = 0.25  # seconds


def classify_process() -> None:
    """Poll the queue every 0.25 s and classify its images with model.predict."""
    db = Redis(port=int(os.environ["REDIS_PORT"]))
    model = keras.applications.ResNet50(weights=None)
    print("* Model loaded")
    while True:
        queued: Any = db.lrange(QUEUE, 0, BATCH_SIZE - 1)
        ids, batch = [], None
        for entry in queued:
            job = json.loads(entry)
            pixels = np.frombuffer(base64.b64decode(job["image"]), np.float32).reshape(1, 224, 224, 3)
            batch = pixels if batch is None else np.vstack([batch, pixels])
            ids.append(job["id"])
        if batch is not None:
            print(f"* Batch size: {batch.shape}")
            for job, row in zip(ids, model.predict(batch, verbose=0), strict=True):
                best = row.argsort()[::-1][:5]
                db.set(job, json.dumps([{"label": f"class_{i}", "probability": float(row[i])} for i in best]))
            db.ltrim(QUEUE, len(ids), -1)
        time.sleep(SLEEP)


if __name__ == "__main__":
    classify_process()
