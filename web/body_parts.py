"""Parts of a request's body, each an image or an image's pixels, which are read only when it is their turn."""

import io
import os
from typing import IO, Any

import numpy as np

import settings
from helpers import Shape, base64_encode_image
from web.errors import BadRequest

PIXEL_TYPES: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4")}  # the protocol's names


class Part(io.BufferedIOBase):
    """`size` bytes of `body` from `start`. It can be read as often as needed. Threads may read parts of one body."""

    def __init__(self, body: IO[bytes], start: int, size: int) -> None:
        self.start = start
        self.size = size
        self.body = body
        self._at = 0

    def close(self) -> None:
        """Do nothing: the owner of the body closes it."""

    def readable(self) -> bool:
        """Return True, as io expects of a stream that can be read."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to `offset` and return the new position."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next `size` bytes, by default the rest."""
        data = self.peek(self._at, self.size if size is None or size < 0 else size)
        self._at += len(data)
        return data

    def peek(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer at the end, and do not move."""
        start, size = self.start + offset, max(0, min(size, self.size - offset))
        if isinstance(self.body, io.BytesIO):
            with self.body.getbuffer() as view:
                return bytes(view[start : start + size])
        return os.pread(self.body.fileno(), size, start)

    def within(self, start: int, size: int) -> "Part":
        """Return a part of this part."""
        return Part(self.body, self.start + start, size)


class PixelPart(Part):
    """The pixels of one image, 0 to 255, in `shape` and of a type in PIXEL_TYPES."""

    def __init__(self, part: Part, datatype: str, shape: Shape) -> None:
        super().__init__(part.body, part.start, part.size)
        self.datatype = datatype
        self.shape = shape

    def encode(self) -> str:
        """Return the pixels as base64 text of IMAGE_DTYPE. Raises BadRequest if a value is not from 0 to 255."""
        pixels = np.frombuffer(self.peek(0, self.size), PIXEL_TYPES[self.datatype])
        if self.datatype == "FP32":
            if not (pixels.min() >= 0 and pixels.max() <= 255):  # false for NaN too
                raise BadRequest("The tensor `pixels` has values that are not numbers from 0 to 255, so scale them.")
            if settings.IMAGE_DTYPE == "uint8":
                pixels = np.rint(pixels)
        return base64_encode_image(pixels.astype(settings.IMAGE_DTYPE, copy=False))
