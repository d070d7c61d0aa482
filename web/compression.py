"""Decompress the body of a request while it is read: Content-Encoding gzip or deflate."""

import io
import zlib
from collections.abc import Mapping
from typing import IO

import flask
from werkzeug.wsgi import get_input_stream

import settings
from helpers import megabytes
from web.errors import BadRequest, WebError, printable
from web.image_preparation import TooLarge

CHUNK = 2**16  # bytes to read at once
# zlib's `wbits` for each encoding. "deflate" means zlib's format, but some clients send raw deflate.
ENCODINGS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
RAW_DEFLATE = -15
MAX_GZIP_MEMBERS = 1000  # since each takes time in Python; bgzip writes 256 for a file of 16 MB


class UnsupportedMediaType(WebError):
    """The service can't decompress the Content-Encoding of this request."""

    status, code = 415, "unsupported_media_type"
    headers: Mapping[str, str] = {"Accept-Encoding": "gzip, deflate"}


def encodings(request: flask.Request) -> list[str]:
    """Return the encodings that Content-Encoding names, in lower case and without "identity"."""
    named = (name.strip().lower() for name in request.headers.get("Content-Encoding", "").split(","))
    return [name for name in named if name not in ("", "identity")]


def decompressed_body(request: flask.Request) -> IO[bytes]:
    """Return the body as a stream, decompressed. Raises UnsupportedMediaType, and RequestEntityTooLarge when read."""
    # Werkzeug rejects a body as large as its limit, hence the extra byte.
    body = get_input_stream(request.environ, max_content_length=settings.MAX_UPLOAD_BYTES + 1)
    names = encodings(request)
    if not names:
        return body
    if len(names) > 1 or names[0] not in ENCODINGS:
        given = printable(", ".join(names))
        raise UnsupportedMediaType(f"The Content-Encoding is {given}, so send gzip, deflate or no compression.")
    return io.BufferedReader(Decompressed(body, ENCODINGS[names[0]]), CHUNK)


class Decompressed(io.RawIOBase):
    """A gzip or deflate stream that is decompressed in pieces while it is read.

    Reading raises BadRequest if the stream is damaged or cut off, and TooLarge beyond MAX_UPLOAD_BYTES, so a
    decompression bomb costs no more than a normal upload.
    """

    def __init__(self, compressed: IO[bytes], wbits: int) -> None:
        self._compressed = compressed
        self._wbits = wbits
        self._decompressor = zlib.decompressobj(wbits)
        self._rest = b""  # bytes that were read ahead: the start of the next member
        self._begun = False
        self._size = 0
        self._members = 1

    def readable(self) -> bool:
        """Return True, as io expects of a stream that can be read."""
        return True

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """Read the next piece into `buffer`; return its length, 0 at the end."""
        data = self._next(len(buffer))
        self._size += len(data)
        if self._size > settings.MAX_UPLOAD_BYTES:
            limit = megabytes(settings.MAX_UPLOAD_BYTES)
            raise TooLarge(f"A request may have at most {limit} when decompressed, so send a smaller image.")
        buffer[: len(data)] = data
        return len(data)

    def _next(self, most: int) -> bytes:
        while not self._decompressor.eof or self._begin_next_member():
            compressed = self._decompressor.unconsumed_tail or self._read()
            try:
                data = self._decompressor.decompress(compressed, most)
            except zlib.error:
                raise BadRequest("The body is damaged: it can't be decompressed by its Content-Encoding.") from None
            if data:
                return data
            if not compressed and not self._decompressor.eof:
                raise BadRequest("The body ends before its compressed data does, so send all of it again.")
        return b""

    def _read(self) -> bytes:
        """Return the next compressed bytes, b"" at the end. The first ones show whether "deflate" is raw deflate."""
        compressed, self._rest = self._rest or self._compressed.read(CHUNK), b""
        if not self._begun and self._wbits == ENCODINGS["deflate"] and not has_zlib_header(compressed):
            self._decompressor = zlib.decompressobj(RAW_DEFLATE)
        self._begun = True
        return compressed

    def _begin_next_member(self) -> bool:
        """Begin the next gzip member, if there is one: gzip files may be concatenated and padded with zeros."""
        rest = self._decompressor.unused_data.lstrip(b"\0")
        while not rest:
            compressed = self._compressed.read(CHUNK)
            if not compressed:
                return False
            rest = compressed.lstrip(b"\0")
        self._members += 1
        if self._wbits != ENCODINGS["gzip"] or self._members > MAX_GZIP_MEMBERS:
            raise BadRequest("The body goes on after its compressed data, so send nothing after that.")
        self._rest = rest
        self._decompressor = zlib.decompressobj(self._wbits)
        return True


def has_zlib_header(compressed: bytes) -> bool:
    """Whether the data begins with zlib's two-byte header, which raw deflate almost never does."""
    return len(compressed) > 1 and compressed[0] & 15 == 8 and int.from_bytes(compressed[:2]) % 31 == 0
