"""Read the images from a form (multipart/form-data): each is a file in the field `image`.

A form with one file and nothing else, as most clients send, is split at its boundary. Any other form is read by
Werkzeug's parser, which takes ten times as long.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import IO

import flask
from werkzeug.datastructures import Headers
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.sansio.multipart import Data, Epilogue, Event, Field, File, MultipartDecoder, NeedData, State

import settings
from web.compression import CHUNK
from web.errors import BadRequest, WebError, printable
from web.image_preparation import MissingImage, TooLarge

NewStream = Callable[[], IO[bytes]]  # returns an empty stream to store an image in
FORM = "multipart/form-data"
MAX_FORM_HEADERS = 4 * CHUNK  # bytes before the first part of a form, and in the headers of each part
MAX_TEXT_FIELDS = 1000
# The headers of a part with a file in the field `image`, as curl, browsers and HTTP libraries write them.
FILE_HEADERS = re.compile(
    rb'(?i:Content-Disposition): form-data; name="image"; filename="[^"\\\0-\x1f\x7f]{0,1000}"\r\n'
    rb"(?:(?i:Content-(?:Type|Length|Transfer-Encoding)): [ -~]{0,100}\r\n){0,3}\r\n"
)
# One line of base64, or its first 100 characters.
BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{16,}={0,2}(\r?\n|$)|[A-Za-z0-9+/_-]{100}")
SET_BY_CLIENT = "let your HTTP client set this header itself"
NO_BOUNDARY = f"The boundary in the Content-Type does not occur in the body, so {SET_BY_CLIENT}."
AS_A_FORM = "send the image as a file in the multipart form field `image`, as in curl -F image=@photo.jpg"


def boundary(request: flask.Request) -> bytes:
    """Return the boundary between the parts of the request's form. Raises BadRequest."""
    given = request.mimetype_params.get("boundary", "")
    if not (given and given.isascii() and given.isprintable()):
        fault = "no valid boundary" if "boundary" in (request.content_type or "") else "no boundary"
        raise BadRequest(f"The Content-Type {FORM} has {fault}, so {SET_BY_CLIENT}.")
    return given.encode()


def only_file(body: bytes, boundary: bytes) -> bytes | None:
    """Return the file if `body` is a form with one file in the field `image` and nothing else; None for any other."""
    mark = b"--" + boundary
    headers = FILE_HEADERS.match(body, len(mark) + 2) if body.startswith(mark + b"\r\n") else None
    if not headers:
        return None
    # A parser may end the part at any mark, so there must be no other.
    end = body.find(mark, headers.end()) - 2
    if end < headers.end() or body[end:] not in (b"\r\n%s--\r\n" % mark, b"\r\n%s--" % mark):
        return None
    return body[headers.end() : end]


def form_images(body: IO[bytes], boundary: bytes, new: NewStream) -> list[IO[bytes]]:
    """Return the files in the field `image` of a form. Raises MissingImage, BadRequest, TooLarge."""
    with ExitStack() as on_error:
        form = Form(new, on_error)
        for event in events(body, boundary):
            form.take(event)
        if not form.images:
            raise MissingImage(form.why_none())
        for image in form.images:
            image.seek(0)
        on_error.pop_all()
        return form.images


class Form:
    """Collects the images of a form part by part, and what the error message needs if there are none."""

    def __init__(self, new: NewStream, on_error: ExitStack) -> None:
        self.images: list[IO[bytes]] = []
        self._new = new
        self._on_error = on_error  # closes the images
        self._other_files: list[str] = []  # field names
        self._text: bytes | None = None  # the start of a text field `image`
        self._write: Callable[[bytes], object]  # takes the data of the current part

    def take(self, event: Event) -> None:
        """Process the start of a part, or data of the current part. Raises TooLarge."""
        match event:
            case File(name="image"):
                self._write = self._new_image().write
            case File(name=name):
                self._other_files.append(name or "")
                self._write = len  # ignore the data
            case Field(name=name):
                self._write = self._keep_text if name == "image" else len
            case Data(data=data):
                self._write(data)

    def _new_image(self) -> IO[bytes]:
        if len(self.images) == settings.MAX_IMAGES:
            raise TooLarge(f"A request may have at most {settings.MAX_IMAGES} images, so send several requests.")
        self.images.append(self._on_error.enter_context(self._new()))
        return self.images[-1]

    def _keep_text(self, data: bytes) -> None:
        self._text = self._text or data[:100]

    def why_none(self) -> str:
        """Return the error message for a form without an image."""
        if self._text is not None:
            return text_instead(self._text)
        if self._other_files:
            names = ", ".join(f"`{printable(name)}`" for name in self._other_files[:3])
            return f"The form has a file in {names}, but none in `image`, so name its field `image`."
        return f"The form has no file, so {AS_A_FORM}."


def text_instead(text: bytes) -> str:
    """Return the error message for a field `image` that is not a file; `text` is its start."""
    if text.startswith(b"data:"):
        fault, do = "holds a data: URL", "decode it and send the bytes as a file"
    elif BASE64.match(text):
        fault, do = "holds base64 text", "decode it and send the bytes as a file"
    elif re.match(rb"https?://", text):
        fault, do = "holds a web address, which the service does not fetch", "send the image itself as a file"
    else:
        fault, do = "is a text field, since the part has no filename", "send it as a file"
    return f"The form field `image` {fault}, so {do}, as in curl -F image=@photo.jpg."


def events(body: IO[bytes], boundary: bytes) -> Iterator[Event]:
    """Yield the start of each part of a form, and its data in pieces. Raises BadRequest, TooLarge."""
    max_parts = settings.MAX_IMAGES + MAX_TEXT_FIELDS
    decoder = Decoder(boundary, max_form_memory_size=MAX_FORM_HEADERS, max_parts=max_parts)
    for chunk in chain(iter(partial(body.read, CHUNK), b""), [None]):
        if chunk and decoder.state is State.EPILOGUE:
            continue  # ignore what follows the form
        try:
            decoder.receive_data(chunk)
            while not isinstance(event := decoder.next_event(), NeedData | Epilogue):
                yield event
        except RequestEntityTooLarge:
            raise form_too_large(decoder.state) from None
        except ValueError:
            raise form_malformed(decoder) from None


def form_too_large(state: State) -> WebError:
    """Return the error for a form that exceeded a limit while the decoder was in `state`."""
    if state is State.PREAMBLE:
        return BadRequest(NO_BOUNDARY)
    if state is State.PART:
        return BadRequest("A part of the form has headers that are too long, so send shorter ones.")
    return TooLarge(f"The form has more than {MAX_TEXT_FIELDS} parts, so send fewer.")


def form_malformed(decoder: MultipartDecoder) -> BadRequest:
    """Return the error for a form that the decoder can't parse."""
    if not decoder.complete:
        return BadRequest("A part of the form has no header Content-Disposition, so send each part with a name.")
    if decoder.state is State.PREAMBLE:
        return BadRequest(NO_BOUNDARY if decoder.buffer else f"The body is empty, so {AS_A_FORM}.")
    return BadRequest("The form ends before its closing boundary, so send all of it again.")


class Decoder(MultipartDecoder):
    """Werkzeug's decoder, but it accepts file names that are not UTF-8."""

    def _parse_headers(self, data: bytes | bytearray) -> Headers:
        return super()._parse_headers(data.decode(errors="replace").encode())
