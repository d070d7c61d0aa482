"""The models that clients may ask for: what the model servers announce, and which one is the default."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import settings
from helpers import ServiceError, default_model, model_name
from image_queue import REFRESH_EVERY, RedisDown, Refreshed, WebQueue, announced
from web.errors import WebError, printable

About = dict[str, Any]
CountJobsOf = Callable[[str, str, int], None]  # called with a model, an event and the number of jobs


class State(NamedTuple):
    """A model now: its queue's key and length, and the heartbeats of its live servers, by the server's name."""

    key: str
    waiting: int
    servers: dict[str, About]


class UnknownModel(WebError):
    """No model server has announced a model of this name."""

    status, code = 404, "unknown_model"


class ServedModels:
    """The models of this service, each with its queue. Any number of threads may use it."""

    def __init__(self, queue: WebQueue, count: CountJobsOf) -> None:
        """Use the connections of `queue`, the default model's."""
        self._base = queue
        self._count = count
        # None until Redis answers
        self._known: Refreshed[dict[str, About] | None] = Refreshed(self._announced, None, REFRESH_EVERY)
        self._queues: dict[tuple[str, str], WebQueue] = {}

    def known(self) -> dict[str, About]:
        """Return what the servers of each known model announced last, by the model's name."""
        return self._known.value() or {}

    def names(self) -> list[str]:
        """Return the names of the known models, sorted."""
        return sorted(self.known())

    def default(self) -> str:
        """Return the name of the model that /predict asks; "" if nothing is known about it.

        DEFAULT_MODEL or the first of MODELS; otherwise the model on the default queue, or the only one that there is.
        """
        if settings.DEFAULT_MODEL or settings.models():
            return default_model()
        known = self.known()
        on_default_queue = [name for name, about in known.items() if about["queue"] == settings.IMAGE_QUEUE]
        return next(iter(on_default_queue or (known if len(known) == 1 else [default_model()])))

    def about(self, name: str = "") -> About:
        """Return what the servers of a model announced last; {} for a default model that no server has announced.

        Raises UnknownModel, RedisDown.
        """
        known, default = self.known(), self.default()
        if not (name or default) or name not in ("", default, *known):
            known = self._known.latest() or {}  # it may have been announced just now
            if name and name not in known:
                raise self.unknown(name)
        return known.get(name or self.default(), {})

    def queue(self, name: str = "") -> WebQueue:
        """Return the queue of a model, by default the default one's. Raises UnknownModel, RedisDown."""
        about = self.about(name)  # may find out which model is the default one
        return self._queue(name or self.default(), about)

    def servers(self, name: str = "") -> dict[str, About]:
        """Return the heartbeats of a model's live servers, by the server's name. Raises RedisError, UnknownModel."""
        queue = self.queue(name)
        return {server: about for server, about in queue.live_servers().items() if self._serves(about, queue)}

    def states(self) -> dict[str, State]:
        """Return the state of each known model, and of the default one. Raises RedisError."""
        live, known = self._base.live_servers_by_queue(), self.known()
        queues = [self._queue(name, known.get(name, {})) for name in {*known, self.default()}]
        return {queue.model: self._state(queue, live.get(queue.key, {})) for queue in queues}

    def pending(self, states: dict[str, State]) -> dict[str, int]:
        """Return the number of images of each of these models that wait or are in flight. Raises RedisError."""
        by_queue = self._base.pending_by_queue(state.key for state in states.values())
        return {name: by_queue[state.key] for name, state in states.items()}

    def _queue(self, model: str, about: About) -> WebQueue:
        key = str(about.get("queue", settings.IMAGE_QUEUE))
        if (model, key) not in self._queues:
            self._queues[model, key] = self._base.of(model, key, partial(self._count, model))
        return self._queues[model, key]

    def _state(self, queue: WebQueue, live: dict[str, About]) -> State:
        servers = {server: about for server, about in live.items() if self._serves(about, queue)}
        return State(queue.key, queue.waiting(), servers)

    def _serves(self, about: About, queue: WebQueue) -> bool:
        """Whether a server on `queue` answers for its model. For the default model, every server on its queue does."""
        return queue.model in (self.default(), "") or about.get("model") == queue.model

    def check(self) -> None:
        """Check that Redis is usable. Raises UnusableRedis, RedisError."""
        self._base.check()

    @property
    def risks(self) -> list[str]:
        """What may cost requests although Redis is usable, as the last check() found."""
        return self._base.risks

    def _announced(self) -> dict[str, About]:
        """Return what each model's servers announced last. Raises RedisError.

        Servers of an older version announce nothing, but have heartbeats on the default queue. Finding heartbeats scans
        all keys of Redis, so this is the last resort.
        """
        known = announced(self._base.redis)
        if not any(about["queue"] == settings.IMAGE_QUEUE for about in known.values()):
            for about in self._base.live_servers().values():
                name = model_name(f"{about.get('model') or ''}.keras")
                known[name] = {**about, "queue": settings.IMAGE_QUEUE}
        return known

    def unknown(self, name: str) -> ServiceError:
        """Return the error for a model that is not known: while Redis does not answer, it may well exist."""
        if self._known.cached is None:
            return RedisDown("The queue can't be reached now, so try again in a few seconds.")
        names = self.names()
        known = f"the models are {', '.join(names)}" if names else "no model server has announced a model yet"
        return UnknownModel(f"There is no model {printable(name)}, so ask for another one: {known}.")
