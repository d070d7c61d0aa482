"""Requests for inference in the Open Inference Protocol: JSON, and binary tensors after it.

A request has one input: `image`, a BYTES tensor of image files, or `pixels`, a UINT8 or FP32 tensor of the model's
shape. In JSON, which can't hold bytes, an image file is base64 text.
"""

import math
from collections.abc import Callable
from itertools import chain
from typing import IO, Any, NamedTuple, TypeGuard, TypeVar

import numpy as np
import orjson
import pybase64

import settings
from helpers import Shape
from web.body_parts import PIXEL_TYPES, Part, PixelPart
from web.errors import BadRequest, printable
from web.image_preparation import MissingImage, TooLarge

T = TypeVar("T")
NewStream = Callable[[], IO[bytes]]  # returns an empty stream to store what the JSON contained
Json = dict[str, Any]

IMAGE, PIXELS, PROBABILITIES = "image", "pixels", "probabilities"
DATATYPES = {IMAGE: ("BYTES",), PIXELS: tuple(PIXEL_TYPES)}
PREFIX = 4  # bytes before each element of a binary BYTES tensor: its length, little-endian
MAX_ID = 1000  # characters
# Bytes of memory for each value in the JSON: in orjson's parser, as an object, in lists, in arrays.
BYTES_PER_VALUE = 88


class InferRequest(NamedTuple):
    """A request for inference: its images and the form of the answer.

    `top` is how many classes to name for each image; 0 asks for the probabilities of all. `binary` says whether the
    output is binary. `id` is None if the request has none.
    """

    parts: list[Part]
    id: str | None
    top: int
    binary: bool


def json_size(header: str | None, length: int) -> int:
    """Return how many bytes of a body of `length` bytes are JSON, by its Inference-Header-Content-Length.

    Raises BadRequest.
    """
    if header is None:
        return length
    if not (header.isascii() and header.isdecimal() and len(header) < 20 and 0 < int(header) <= length):
        raise BadRequest(
            f"The header Inference-Header-Content-Length is {printable(header)}, so send the number of bytes of JSON "
            f"at the start of the body, which has {length}."
        )
    return int(header)


def bytes_to_parse(text: bytes) -> int:
    """Return the most memory that it takes to parse this JSON. Raises TooLarge if that is above MAX_DECODE_BYTES."""
    size = 3 * len(text) + BYTES_PER_VALUE * sum(map(text.count, (b",", b":", b"[", b"{")))
    if size > settings.MAX_DECODE_BYTES:
        raise TooLarge("The JSON has too many values, so send the tensor as binary data, or fewer images.")
    return size


def parse(text: bytes, rest: Part, shape: Shape, new: NewStream) -> InferRequest:
    """Return the request with the JSON `text`, followed by the binary data in `rest`, for a model of this `shape`.

    What the JSON contains of images is stored in a stream from `new`. Raises BadRequest, MissingImage, TooLarge.
    """
    try:
        fields = orjson.loads(text)
    except ValueError:
        raise BadRequest("The body is not valid JSON, so send a request of the Open Inference Protocol.") from None
    fields = checked(fields, dict, "The body must be a JSON object")
    name = checked(fields.get("id", ""), str, "`id` must be text")
    if len(name) > MAX_ID:
        raise BadRequest(f"`id` has {len(name)} characters, so send at most {MAX_ID}.")
    inputs = checked(fields.get("inputs"), list, "`inputs` must be a list")
    if len(inputs) != 1:
        raise BadRequest(f"The request has {len(inputs)} inputs, so send exactly one, {expected(shape)}.")
    top, binary = wanted(fields)
    tensor = checked(inputs[0], dict, "An input must be a JSON object")
    return InferRequest(parts_of(tensor, rest, shape, new), name if "id" in fields else None, top, binary)


def wanted(fields: Json) -> tuple[int, bool]:
    """Return how many classes the client wants for each image (0: all probabilities), and whether it wants binary data.

    Raises BadRequest.
    """
    outputs = checked(fields.get("outputs", []), list, "`outputs` must be a list")
    if len(outputs) > 1:
        raise BadRequest(f"The request names {len(outputs)} outputs, so ask only for `{PROBABILITIES}`.")
    output = checked(outputs[0] if outputs else {"name": PROBABILITIES}, dict, "An output must be a JSON object")
    if output.get("name") != PROBABILITIES:
        raise BadRequest(f"The only output is `{PROBABILITIES}`, so ask for that one.")
    all_outputs, this = parameters(fields), parameters(output)
    top = this.get("classification", all_outputs.get("classification", 0))
    if not is_count(top):
        raise BadRequest("The parameter `classification` must be the number of classes for each image.")
    binary = this.get("binary_data", all_outputs.get("binary_data_output", False))
    return min(top, 2**31), checked(binary, bool, "`binary_data` must be true or false")


def parameters(fields: Json) -> Json:
    """Return the parameters of a request, an input or an output. Raises BadRequest."""
    given = checked(fields.get("parameters", {}), dict, "`parameters` must be a JSON object")
    if "shared_memory_region" in given:
        raise BadRequest("The service has no shared memory, so send and receive tensors in the body.")
    return given


def parts_of(tensor: Json, rest: Part, shape: Shape, new: NewStream) -> list[Part]:
    """Return the images of an input. Raises BadRequest, MissingImage, TooLarge."""
    name, datatype = tensor.get("name"), tensor.get("datatype")
    if not (isinstance(name, str) and name in DATATYPES):
        raise BadRequest(f"The input has another name than the model's, so send {expected(shape)}.")
    if datatype not in DATATYPES[name]:
        raise BadRequest(f"The input `{name}` has another datatype than the model's, so send {expected(shape)}.")
    count = number_of_images(name, tensor.get("shape"), shape)
    if "binary_data_size" in parameters(tensor):
        check_binary(tensor, rest)
        return elements(rest, count) if name == IMAGE else pixel_parts(rest, count, datatype, shape)
    if rest.size:
        raise BadRequest("Binary data follows the JSON, so give the input the parameter `binary_data_size`.")
    values = flat(checked(tensor.get("data"), list, f"The input `{name}` must have its values in the list `data`"))
    if name == IMAGE:
        return decoded(values, count, new)
    return pixel_parts(stored([to_bytes(values, datatype)], new)[0], count, datatype, shape)


def number_of_images(name: str, given: object, shape: Shape) -> int:
    """Return the first number of the shape of the input `name`. Raises BadRequest, TooLarge."""
    known = isinstance(given, list) and given and all(map(is_count, given))
    if not (known and tuple(given[1:]) in ([(), (1,)] if name == IMAGE else [shape])):  # type: ignore[index]
        raise BadRequest(f"The input `{name}` has another shape than the model's, so send {expected(shape)}.")
    count: int = given[0]  # type: ignore[index]
    if count == 0:
        raise MissingImage(f"The input `{name}` has no images, so send at least one.")
    if count > settings.MAX_IMAGES:
        raise TooLarge(f"A request may have at most {settings.MAX_IMAGES} images, so send several requests.")
    return count


def check_binary(tensor: Json, rest: Part) -> None:
    """Raise BadRequest unless the binary data of the only input is all that follows the JSON."""
    if "data" in tensor:
        raise BadRequest("The input has both `data` and `binary_data_size`, so send only one of them.")
    if not is_count(size := parameters(tensor)["binary_data_size"]) or size != rest.size:
        raise BadRequest(
            f"The parameter `binary_data_size` must be the number of bytes after the JSON, which is {rest.size}; the "
            "header Inference-Header-Content-Length says where they begin."
        )


def elements(rest: Part, count: int) -> list[Part]:
    """Return the elements of a binary BYTES tensor. Raises BadRequest, MissingImage."""
    parts: list[Part] = []
    start = 0
    while start < rest.size and len(parts) <= count:
        size = int.from_bytes(rest.peek(start, PREFIX), "little")
        start += PREFIX
        parts.append(rest.within(start, size))
        start += size
    if start != rest.size or len(parts) != count:
        raise BadRequest(
            f"The binary data of `{IMAGE}` is not {count} elements, so send each image after its length in bytes, as 4 "
            "bytes in little-endian order."
        )
    return not_empty(parts)


def decoded(values: list[Any], count: int, new: NewStream) -> list[Part]:
    """Return the images in base64. Raises BadRequest, MissingImage."""
    if len(values) != count:
        raise BadRequest(f"The input `{IMAGE}` has {len(values)} elements, but its shape says {count}.")
    images = []
    for number, value in enumerate(values):
        try:
            images.append(pybase64.b64decode(checked(value, str, "An image must be text"), validate=True))
        except ValueError:
            raise BadRequest(f"Element {number} of `{IMAGE}` is not base64, so encode the image file.") from None
    return not_empty(stored(images, new))


def not_empty(parts: list[Part]) -> list[Part]:
    """Return the parts. Raises MissingImage if one is empty."""
    for number, part in enumerate(parts):
        if not part.size:
            raise MissingImage(f"Element {number} of `{IMAGE}` is empty, so send an image.")
    return parts


def stored(contents: list[bytes], new: NewStream) -> list[Part]:
    """Return each of `contents` as a part of one new stream."""
    stream = new()
    stream.write(b"".join(contents))
    stream.flush()
    ends = np.cumsum([len(each) for each in contents]).tolist()
    return [Part(stream, end - len(each), len(each)) for end, each in zip(ends, contents, strict=True)]


def pixel_parts(part: Part, count: int, datatype: str, shape: Shape) -> list[Part]:
    """Return the images in a tensor of pixels. Raises BadRequest if it has another size."""
    size = math.prod(shape) * PIXEL_TYPES[datatype].itemsize
    if part.size != count * size:
        raise BadRequest(
            f"The input `{PIXELS}` has {part.size // PIXEL_TYPES[datatype].itemsize} values, but its shape says "
            f"{count * math.prod(shape)}."
        )
    return [PixelPart(part.within(number * size, size), datatype, shape) for number in range(count)]


def flat(values: list[Any]) -> list[Any]:
    """Return the values of nested lists in one list. Values beside lists stay as they are."""
    while set(map(type, values)) == {list}:
        values = list(chain.from_iterable(values))
    return values


def to_bytes(values: list[Any], datatype: str) -> bytes:
    """Return pixels from JSON as binary data. Raises BadRequest."""
    try:
        if datatype == "UINT8" and set(map(type, values)) <= {int}:
            return bytes(values)
        if datatype == "FP32" and set(map(type, values)) <= {int, float}:
            with np.errstate(over="ignore"):  # becomes infinite, which encode() refuses
                return np.array(values, np.float64).astype(PIXEL_TYPES[datatype]).tobytes()
    except (ValueError, OverflowError):
        pass
    kind = "whole numbers" if datatype == "UINT8" else "numbers"
    raise BadRequest(f"The input `{PIXELS}` must have {kind} from 0 to 255 in `data`.")


def expected(shape: Shape) -> str:
    """Return the inputs for a message."""
    sizes = ", ".join(map(str, shape))
    return f"`{IMAGE}` (BYTES of shape [n]) or `{PIXELS}` (UINT8 or FP32 of shape [n, {sizes}])"


def checked(value: object, kind: type[T], message: str) -> T:
    """Return `value`. Raises BadRequest if it is not of this kind."""
    if not isinstance(value, kind):
        raise BadRequest(f"{message}.")
    return value


def is_count(value: object) -> TypeGuard[int]:
    """Whether `value` is a whole number of at least 0."""
    return type(value) is int and value >= 0
