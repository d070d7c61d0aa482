"""What the service knows of a model besides its network."""

from collections.abc import Sequence
from dataclasses import dataclass

from helpers import Shape

DEFAULT_TOP = 5  # predictions in an answer


@dataclass(frozen=True)
class Facts:
    """What the service needs to know of a model besides its network.

    `shape` is (height, width, channels) of an image, `labels` the names of the classes, `labels_from` where they come
    from (for messages), `preprocessing` what is done to pixels before the model, `top` the number of predictions in an
    answer, `activation` the one that makes the model's output, such as "softmax"; empty if unknown.
    """

    shape: Shape
    labels: Sequence[str]
    labels_from: str
    preprocessing: str = "none"
    top: int = DEFAULT_TOP
    description: str = ""
    activation: str = ""
