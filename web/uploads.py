"""Read the images from the body of POST /predict, and tell clients what is wrong with a body that has none.

The body is a form (multipart/form-data, each image a file in the field `image`) or the image itself (as image/...,
application/octet-stream or without a Content-Type).

Small uploads stay in memory, and larger ones too while the process has memory for them; others are stored in temporary
files, as are those of unknown size: chunked or compressed.
"""

import io
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO

import flask
from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge

import settings
from helpers import megabytes
from image_queue.memory import Reservation, reserve
from web.compression import CHUNK, decompressed_body, encodings
from web.errors import printable
from web.form import AS_A_FORM, FORM, NewStream, boundary, form_images, only_file
from web.image_preparation import MissingImage, TooLarge
from web.storage import new_file, storage_errors

# Sent by programs that do not know the file's type; Amazon S3 sends the last one.
UNKNOWN_TYPES = ("", "application/octet-stream", "binary/octet-stream")
SMALL = 2**16  # bytes of a request that always stays in memory
LARGEST_IN_MEMORY = 2**20  # bytes of a request; with larger ones, a few slow clients would use up all memory


class UploadInMemory(io.BytesIO):
    """An upload and its part of the process's memory, which is free again when the upload is closed or forgotten."""

    def __init__(self, reservation: Reservation | None, data: bytes = b"") -> None:
        super().__init__(data)
        self._reservation = reservation

    def close(self) -> None:
        """Free the memory."""
        super().close()
        self._reservation = None


def uploads(request: flask.Request) -> list[IO[bytes]]:
    """Return the images in `request`, in order, as streams at position 0. The caller closes them.

    Raises MissingImage, BadRequest, TooLarge, UnsupportedMediaType, StorageFull.
    """
    with body_errors():
        body, in_memory, reservation = begin_reading(request)
        if in_memory:
            return images_in_memory(request, read(request, int(size_if_known(request))), reservation)
        return images(request, body, new_file)


def whole_request(request: flask.Request) -> tuple[IO[bytes], int, NewStream]:
    """Return the body of `request` as a stream, its size, and what makes more streams for its contents.

    The caller closes them. Raises BadRequest, TooLarge, UnsupportedMediaType, StorageFull.
    """
    with body_errors(), ExitStack() as on_error:
        body, in_memory, reservation = begin_reading(request)
        if in_memory:
            data = read(request, int(size_if_known(request)))
            return UploadInMemory(reservation, data), len(data), lambda: UploadInMemory(reservation)
        stream = on_error.enter_context(new_file())
        shutil.copyfileobj(body, stream, CHUNK)
        stream.flush()
        on_error.pop_all()
        return stream, stream.tell(), new_file


def begin_reading(request: flask.Request) -> tuple[IO[bytes], bool, Reservation | None]:
    """Return the body as a stream, whether to keep it in memory, and the memory that was reserved for it."""
    body = decompressed_body(request)
    size = size_if_known(request)
    reservation = reserve(int(size)) if SMALL < size <= LARGEST_IN_MEMORY else None
    return body, size <= SMALL or bool(reservation), reservation


@contextmanager
def body_errors() -> Iterator[None]:
    """Turn the errors of reading and storing a body into TooLarge and StorageFull."""
    try:
        with storage_errors():  # only the disk can raise OSError here: Werkzeug turns a lost client into another error
            yield
    except RequestEntityTooLarge:
        limit = megabytes(settings.MAX_UPLOAD_BYTES)
        raise TooLarge(f"A request may have at most {limit}, so send a smaller image.") from None


def size_if_known(request: flask.Request) -> float:
    """Return the bytes of the body; infinity if they are not known in advance: it is compressed or chunked."""
    length = request.content_length
    return math.inf if length is None or encodings(request) else length


def read(request: flask.Request, size: int) -> bytes:
    """Return the body, which has `size` bytes. Raises ClientDisconnected.

    Apache's stream returns all of it from one call; Werkzeug's own stream would copy it three times.
    """
    try:
        body: bytes = request.environ["wsgi.input"].read(size)
    except (OSError, ValueError):
        raise ClientDisconnected from None
    if len(body) < size:
        raise ClientDisconnected
    return body


def images_in_memory(request: flask.Request, body: bytes, reservation: Reservation | None) -> list[IO[bytes]]:
    """Return the images in `body`, which share its reservation."""
    image = only_file(body, boundary(request)) if request.mimetype == FORM else None
    if image is not None:
        return [UploadInMemory(reservation, image)]
    return images(request, io.BytesIO(body), lambda: UploadInMemory(reservation))


def images(request: flask.Request, body: IO[bytes], new: NewStream) -> list[IO[bytes]]:
    """Return the images in `body`, each in a stream from `new`."""
    if request.mimetype == FORM:
        return form_images(body, boundary(request), new)
    if request.mimetype.startswith("image/") or request.mimetype in UNKNOWN_TYPES:
        return [whole_body(body, new)]
    raise MissingImage(wrong_type(request.mimetype))


def whole_body(body: IO[bytes], new: NewStream) -> IO[bytes]:
    """Return the body, copied to a new stream. Raises MissingImage if it is empty."""
    with ExitStack() as on_error:
        image = on_error.enter_context(new())
        shutil.copyfileobj(body, image, CHUNK)
        if not image.tell():
            raise MissingImage(f"The request has no body, so {AS_A_FORM}.")
        image.seek(0)
        on_error.pop_all()
        return image


def wrong_type(mimetype: str) -> str:
    """Return the error message for a body that is neither a form nor an image."""
    if mimetype == "application/x-www-form-urlencoded":
        return (
            f"curl -d and HTML forms without enctype send text ({mimetype}), so {AS_A_FORM}, or its bytes as the body, "
            "as in curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg'."
        )
    if mimetype == "application/json" or mimetype.endswith("+json"):
        return f"JSON bodies are not accepted, so {AS_A_FORM}, or its bytes as the body with its content type."
    shown = printable(mimetype)
    return f"The Content-Type is {shown}, so {AS_A_FORM}, or its bytes as the body with a Content-Type like image/jpeg."
