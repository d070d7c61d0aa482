"""The client's side of POST /predict: how an image may be sent, and what to tell a client that sends it otherwise.

    a form     multipart/form-data, each image a file in the field `image`
    a body     the image itself, as image/..., application/octet-stream or without a Content-Type

Either may be packed (Content-Encoding: gzip or deflate). Images wait for their turn in temporary files, not in memory.
"""

import io
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import IO

import flask
from werkzeug.datastructures import Headers
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.sansio.multipart import Data, Epilogue, Event, Field, File, MultipartDecoder, NeedData, State
from werkzeug.wsgi import get_input_stream

import settings
from helpers import ServiceError, megabytes
from web.image_preparation import MissingImage, TooLarge
from web.storage import new_file, out_of_room_is_503

FORM = "multipart/form-data"
# What programs send that know nothing of the file; the last is Amazon S3's.
UNKNOWN_KINDS = ("", "application/octet-stream", "binary/octet-stream")
# zlib's `wbits`. HTTP's "deflate" should be zlib's format, and is raw from some clients: see Unpacked.
PACKINGS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
RAW_DEFLATE = -15
CHUNK = 2**16  # bytes
SMALL_UPLOAD = 2**16  # bytes: kept in memory
MOST_FORM_HEADERS = 4 * CHUNK  # bytes before the first part of a form, and of the headers of each part
MOST_TEXT_FIELDS = 1000
MOST_MEMBERS = 1000  # of a gzip body, each of which costs some Python; a file of 16 MB that bgzip packs has 256
# A line of it, or its first 100 signs.
BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{16,}={0,2}(\r?\n|$)|[A-Za-z0-9+/_-]{100}")
SET_BY_CLIENT = "let your HTTP client set this header itself"
NO_BOUNDARY = f"The boundary that the Content-Type names is not in the body, so {SET_BY_CLIENT}."
AS_A_FORM = "send the image as a file in the multipart form field `image`, as in curl -F image=@photo.jpg"


class BadForm(ServiceError):
    """The body is not the form that its Content-Type says, or is not packed as its Content-Encoding says."""

    status, code = 400, "bad_request"


class UnsupportedMediaType(ServiceError):
    """The body is packed in a way that the service can't unpack."""

    status, code = 415, "unsupported_media_type"


def uploads(request: flask.Request) -> list[IO[bytes]]:
    """Return the images of `request` in their order, each as a stream at its beginning, for the caller to close.

    Raises MissingImage, BadForm, TooLarge, UnsupportedMediaType, StorageFull, and werkzeug's RequestEntityTooLarge.
    """
    body = unpacked_body(request)
    with out_of_room_is_503():  # werkzeug has errors of its own for a client that is gone
        if request.mimetype == FORM:
            return form_images(body, boundary(request), is_small(request))
        if request.mimetype.startswith("image/") or request.mimetype in UNKNOWN_KINDS:
            return [whole_body(body, is_small(request))]
    raise MissingImage(wrong_kind(request.mimetype))


def is_small(request: flask.Request) -> bool:
    """Whether all of the request may stay in memory; packed or in chunks, it may turn out to be large."""
    length = request.content_length
    return length is not None and length <= SMALL_UPLOAD and not encodings(request)


def new_upload(small: bool) -> IO[bytes]:
    """Return where an image is to wait."""
    return io.BytesIO() if small else new_file()


def whole_body(body: IO[bytes], small: bool) -> IO[bytes]:
    """Return the body as a file."""
    with ExitStack() as on_error:
        image = on_error.enter_context(new_upload(small))
        shutil.copyfileobj(body, image, CHUNK)
        if not image.tell():
            raise MissingImage(f"The request has no body, so {AS_A_FORM}.")
        image.seek(0)
        on_error.pop_all()
        return image


def wrong_kind(mimetype: str) -> str:
    """Return what to tell a client whose body is neither a form nor an image."""
    if mimetype == "application/x-www-form-urlencoded":
        return (
            f"curl -d and HTML forms without enctype send text ({mimetype}), so {AS_A_FORM}, or its bytes as the body, "
            "as in curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg'."
        )
    if mimetype == "application/json" or mimetype.endswith("+json"):
        return f"An image is not taken inside JSON, so {AS_A_FORM}, or its bytes as the body with its content type."
    shown = printable(mimetype)
    return f"The Content-Type is {shown}, so {AS_A_FORM}, or its bytes as the body with a Content-Type like image/jpeg."


def printable(text: str) -> str:
    """Return the beginning of what a client sent, fit for a message."""
    return "".join(sign if sign.isprintable() else "?" for sign in text[:40])


# Forms


def form_images(body: IO[bytes], boundary: bytes, small: bool) -> list[IO[bytes]]:
    """Return the files `image` of a form. Raises MissingImage, BadForm, TooLarge."""
    with ExitStack() as on_error:
        form = Form(small, on_error)
        for event in events(body, boundary):
            form.take(event)
        if not form.images:
            raise MissingImage(form.why_none())
        for image in form.images:
            image.seek(0)
        on_error.pop_all()
        return form.images


class Form:
    """What has come of a form: its images, and of its other parts what an error needs to say."""

    def __init__(self, small: bool, on_error: ExitStack) -> None:
        self.images: list[IO[bytes]] = []
        self._small = small
        self._on_error = on_error  # closes the images
        self._other_files: list[str] = []  # names of the fields
        self._text: bytes | None = None  # the beginning of a text field `image`
        self._take_data: Callable[[bytes], object]

    def take(self, event: Event) -> None:
        """Take the next part, or the next piece of one. Raises TooLarge."""
        match event:
            case File(name="image"):
                self._take_data = self._new_image().write
            case File(name=name):
                self._other_files.append(name or "")
                self._take_data = len  # nobody asked for it
            case Field(name=name):
                self._take_data = self._begin_text if name == "image" else len
            case Data(data=data):
                self._take_data(data)

    def _new_image(self) -> IO[bytes]:
        if len(self.images) == settings.MAX_IMAGES:
            raise TooLarge(f"A request may have {settings.MAX_IMAGES} images, so send them in several.")
        self.images.append(self._on_error.enter_context(new_upload(self._small)))
        return self.images[-1]

    def _begin_text(self, data: bytes) -> None:
        self._text = self._text or data[:100]

    def why_none(self) -> str:
        """Return what to tell a client whose form has no file `image`."""
        if self._text is not None:
            return text_instead(self._text)
        if self._other_files:
            names = ", ".join(f"`{printable(name)}`" for name in self._other_files[:3])
            return f"The form has a file in {names}, but none in `image`, so name its field `image`."
        return f"The form has no file, so {AS_A_FORM}."


def text_instead(text: bytes) -> str:
    """Return what to tell a client whose field `image` begins with `text`, and is no file."""
    if text.startswith(b"data:"):
        holds, do = "holds a data: URL", "decode it and send the bytes as a file"
    elif BASE64.match(text):
        holds, do = "holds base64 text", "decode it and send the bytes as a file"
    elif re.match(rb"https?://", text):
        holds, do = "holds an address, which the service does not fetch", "send the image itself as a file"
    else:
        holds, do = "is a text field, since the part has no filename", "send it as a file"
    return f"The form field `image` {holds}, so {do}, as in curl -F image=@photo.jpg."


def boundary(request: flask.Request) -> bytes:
    """Return what separates the parts of the request's form. Raises BadForm."""
    given = request.mimetype_params.get("boundary", "")
    if not (given and given.isascii() and given.isprintable()):
        flaw = "no valid boundary" if "boundary" in (request.content_type or "") else "no boundary"
        raise BadForm(f"The Content-Type {FORM} has {flaw}, so {SET_BY_CLIENT}.")
    return given.encode()


def events(body: IO[bytes], boundary: bytes) -> Iterator[Event]:
    """Yield the parts of a form and their data, piece by piece. Raises BadForm, TooLarge."""
    most_parts = settings.MAX_IMAGES + MOST_TEXT_FIELDS
    decoder = Decoder(boundary, max_form_memory_size=MOST_FORM_HEADERS, max_parts=most_parts)
    for chunk in chain(iter(partial(body.read, CHUNK), b""), [None]):
        if chunk and decoder.state is State.EPILOGUE:
            continue  # nothing that may follow the form counts
        try:
            decoder.receive_data(chunk)
            while not isinstance(event := decoder.next_event(), NeedData | Epilogue):
                yield event
        except RequestEntityTooLarge:
            raise too_much(decoder.state) from None
        except ValueError:
            raise unreadable(decoder) from None


def too_much(state: State) -> ServiceError:
    """Return the error for a form that the decoder finds too large, in this state."""
    if state is State.PREAMBLE:
        return BadForm(NO_BOUNDARY)
    if state is State.PART:
        return BadForm("A part of the form has headers that are too long, so send shorter ones.")
    return TooLarge(f"The form has more than {MOST_TEXT_FIELDS} parts, so send fewer.")


def unreadable(decoder: MultipartDecoder) -> BadForm:
    """Return the error for a form that is not one."""
    if not decoder.complete:
        return BadForm("A part of the form has no header Content-Disposition, so send each with its name.")
    if decoder.state is State.PREAMBLE:
        return BadForm(NO_BOUNDARY if decoder.buffer else f"The body is empty, so {AS_A_FORM}.")
    return BadForm("The form ends before its closing boundary, so send it again whole.")


class Decoder(MultipartDecoder):
    """Werkzeug's, which would refuse a form for a file name in another charset than UTF-8."""

    def _parse_headers(self, data: bytes | bytearray) -> Headers:
        return super()._parse_headers(data.decode(errors="replace").encode())


# Packed bodies


def encodings(request: flask.Request) -> list[str]:
    """Return what the body is packed with, by Content-Encoding."""
    named = (name.strip().lower() for name in request.headers.get("Content-Encoding", "").split(","))
    return [name for name in named if name not in ("", "identity")]


def unpacked_body(request: flask.Request) -> IO[bytes]:
    """Return the stream of the body, unpacked. Raises UnsupportedMediaType, and RequestEntityTooLarge when read."""
    # Werkzeug refuses what reaches its limit, so one byte more.
    body = get_input_stream(request.environ, max_content_length=settings.MAX_UPLOAD_BYTES + 1)
    packings = encodings(request)
    if not packings:
        return body
    if len(packings) > 1 or packings[0] not in PACKINGS:
        raise UnsupportedMediaType(
            f"The body is packed with {printable(', '.join(packings))}, so send it with gzip, with deflate or unpacked."
        )
    return io.BufferedReader(Unpacked(body, PACKINGS[packings[0]]), CHUNK)


class Unpacked(io.RawIOBase):
    """The contents of a stream that gzip or deflate has packed, unpacked piece by piece as they are read.

    Reading raises BadForm where it is damaged or cut off, TooLarge beyond MAX_UPLOAD_BYTES: a small file that unpacks
    to gigabytes costs no more than an honest upload.
    """

    def __init__(self, packed: IO[bytes], wbits: int) -> None:
        self._packed = packed
        self._wbits = wbits
        self._unpacker = zlib.decompressobj(wbits)
        self._rest = b""  # of what was read, the beginning of the next member
        self._begun = False
        self._size = 0
        self._members = 1

    def readable(self) -> bool:
        """Whether it can be read: io asks."""
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """Fill `buffer` as far as the next piece goes; 0 at the end."""
        data = self._next(len(buffer))
        self._size += len(data)
        if self._size > settings.MAX_UPLOAD_BYTES:
            raise TooLarge(
                f"A request may have {megabytes(settings.MAX_UPLOAD_BYTES)} unpacked, so send a smaller image."
            )
        buffer[: len(data)] = data
        return len(data)

    def _next(self, most: int) -> bytes:
        while not self._unpacker.eof or self._begin_next_member():
            packed = self._unpacker.unconsumed_tail or self._read()
            try:
                data = self._unpacker.decompress(packed, most)
            except zlib.error:
                raise BadForm("The body is damaged: it can't be unpacked as its Content-Encoding says.") from None
            if data:
                return data
            if not packed and not self._unpacker.eof:
                raise BadForm("The body ends before what its Content-Encoding packs does, so send it again whole.")
        return b""

    def _read(self) -> bytes:
        """Return what is to be unpacked next; empty at the end."""
        packed, self._rest = self._rest or self._packed.read(CHUNK), b""
        if not self._begun and self._wbits == PACKINGS["deflate"] and not has_zlib_header(packed):
            self._unpacker = zlib.decompressobj(RAW_DEFLATE)
        self._begun = True
        return packed

    def _begin_next_member(self) -> bool:
        """Whether there is another: gzip files may be joined, and zeros may follow the last."""
        rest = self._unpacker.unused_data.lstrip(b"\0")
        while not rest:
            packed = self._packed.read(CHUNK)
            if not packed:
                return False
            rest = packed.lstrip(b"\0")
        self._members += 1
        if self._wbits != PACKINGS["gzip"] or self._members > MOST_MEMBERS:
            raise BadForm("The body goes on after what its Content-Encoding packs, so send nothing behind it.")
        self._rest = rest
        self._unpacker = zlib.decompressobj(self._wbits)
        return True


def has_zlib_header(packed: bytes) -> bool:
    """Whether it begins with the two bytes that zlib's format begins with, and raw deflate next to never does."""
    return len(packed) > 1 and packed[0] & 15 == 8 and int.from_bytes(packed[:2]) % 31 == 0
