"""The Redis protocol between the web and the model servers.

Every key begins with IMAGE_QUEUE, here `image_queue`. Values are JSON, never pickle. These are the keys of the default
model. Any other model has the same ones with its name after the prefix, such as `image_queue:digits` and
`image_queue:digits:taken:<server>`, so that a full queue or a poison image is only its own.

key                              type         content
image_queue                      list         waiting jobs, first in, first out: RPUSH by the web, LMOVE from the head
image_queue:taken:<server>       list         jobs that a model server has taken but not yet answered, in that order
image_queue:server:<server>      string, TTL  heartbeat of a model server, with a description of its model
image_queue:result:<id>          list, TTL    the one answer to a job; a list, because BLPOP can wait for it
image_queue:accepted:<id>        string, TTL  accepted marker: the job was pushed and is neither answered nor expired
image_queue:shape                string, TTL  {"shape", "server"}: the image shape that the last heartbeat gave
image_queue:models               string, TTL  list of models: what a server of each model announced last, with its queue
image_queue:model:<name>         string, TTL  this model is known: it had a live server within the last day
image_queue:limit:...            string, TTL  number of requests of a client, by Flask-Limiter (web/access.py)

A job is {"id", "image" (base64), "deadline" (unix seconds)}. Five fields are left out if they have their default:
"request" (the request id that the client sees), "top" (number of predictions), "crashes" (how many servers died with
the job in flight), "shape" ([height, width, channels] of the pixels; default: the model's) and "scores" (true: the
answer has the probabilities of all classes too).

An answer is {"predictions": [{"label", "probability"}, ...], "held_s" (seconds since the job was taken), "compute_s"
(seconds to compute its batch), "batch" (images in its batch), "model", "version"} or {"error": {"code", "message"}}.
With "scores" it also has "scores" (base64 of the probabilities of all classes, float32 in little-endian order) and
"indices" (the class of each of the predictions).

A <server> is <slot>.<session>. The slot stays the same when a model server restarts; each join() begins a new session.
A command that was delayed on a dead connection may still move jobs, but only to the taken list of the old session. That
session has no heartbeat, so its jobs are reclaimed and never mixed into another batch.

Delivery is at least once: each job has exactly one owner at any time.
- The web: after each error and each poll without an answer, until the deadline, it asks whether Redis still has the job
  or its answer, and pushes the job again if not. A poll without an error proves nothing: redis-py reconnects silently,
  so the poll may have reached another Redis than the push did.
- A model server: when its heartbeat expires, another server puts the jobs in its taken list back at the head of the
  queue. A job may thus be computed twice: the web takes the first answer, and the second expires.

The clocks of the machines need not agree. The web sets the accepted marker in the same transaction as the push, and the
marker expires when the web gives up. A model server reads the marker's TTL when it takes the job. It uses `deadline`
only for a job without a marker: one that a simpler client pushed, or one that is already answered or expired.
"""

from image_queue.base import IMAGES_REFUSED, CountJobs, ImageQueue
from image_queue.connection import CLOSE_SURPLUS_EVERY
from image_queue.diagnosis import fault_of
from image_queue.errors import HeartbeatExpired, NoModelServer, QueueFull, RedisDown, ResultTimeout, UnusableRedis
from image_queue.job import LARGEST_SHAPE, Answer, Batch, Job, failed
from image_queue.models import announced, queue_key
from image_queue.refreshed import Refreshed
from image_queue.server_queue import ServerQueue
from image_queue.web_queue import REFRESH_EVERY, WebQueue

__all__ = [
    "CLOSE_SURPLUS_EVERY", "IMAGES_REFUSED", "LARGEST_SHAPE", "REFRESH_EVERY", "Answer", "Batch", "CountJobs",
    "HeartbeatExpired", "ImageQueue", "Job", "NoModelServer", "QueueFull", "RedisDown", "Refreshed", "ResultTimeout",
    "ServerQueue", "UnusableRedis", "WebQueue", "announced", "failed", "fault_of",
    "queue_key",
]  # fmt: skip
